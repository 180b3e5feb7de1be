# Sourced by setup.sh. `run COMMAND ...` runs a command so that a signal to the script reaches every process of it.
#
# On SIGTERM a shell waits for its command, or leaves it running. Here the command has its own process group. On SIGTERM,
# SIGHUP or Ctrl-C the group gets SIGTERM: a run saves and exits, and the script waits for the last process. It then exits
# with 75 (the same command resumes), or 130 after Ctrl-C.

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

group_lives() { # whether a process of the group is running; zombies do not count
    { cat /proc/[0-9]*/stat 2>/dev/null || true; } |
        awk -v group="$running_group" '{ sub(/.*\) /, "") } $3 == group && $1 !~ /[ZX]/ { n++ } END { exit !n }'
}

end_group() {
    trap '' TERM HUP INT
    if [ -n "$running_group" ] && group_lives; then
        # The terminal may be closed: a failed message must not end the wait.
        echo "stopping: running processes save and exit" >&2 || true
        kill -TERM -- "-$running_group" 2>/dev/null || true
        while group_lives; do sleep 0.2; done
    fi
    echo "stopped; the same command resumes" >&2 || true
    exit "$1"
}

trap 'end_group 75' TERM HUP
trap 'end_group 130' INT
