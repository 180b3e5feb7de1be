# Sourced by setup.sh. `run COMMAND ...` runs a command so that a signal to the script reaches all that it started.
#
# A shell that is told to end would otherwise wait for its command, or leave it behind. Here the command has a process
# group of its own; on SIGTERM, SIGHUP or Ctrl-C the group gets SIGTERM, on which a run saves and ends, and the script
# waits for the last process of it. It then exits with 75 (the same command goes on), or 130 after Ctrl-C.

running_group=

run() {
    set -m # a process group for the command
    "$@" &
    running_group=$!
    set +m
    local code=0
    wait "$running_group" || code=$?
    running_group=
    return $code
}

group_lives() { # whether a process of the group is there that has not ended (a zombie has)
    { cat /proc/[0-9]*/stat 2>/dev/null || true; } |
        awk -v group="$running_group" '{ sub(/.*\) /, "") } $3 == group && $1 !~ /[ZX]/ { n++ } END { exit !n }'
}

end_group() {
    trap '' TERM HUP INT
    if [ -n "$running_group" ] && group_lives; then
        # The terminal may be gone: what cannot be said must not end this here.
        echo "stopping: what runs is told to save and end" >&2 || true
        kill -TERM -- "-$running_group" 2>/dev/null || true
        while group_lives; do sleep 0.2; done
    fi
    echo "stopped; the same command goes on from here" >&2 || true
    exit "$1"
}

trap 'end_group 75' TERM HUP
trap 'end_group 130' INT
