"""Folders and checkpoints made to do harm: nothing in them runs, each is refused with an error that says what it is."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.prose import train_model

from pause_megatron.checkpoint import Manifest
from pause_megatron.checkpoint.layout import VOCABULARY
from pause_megatron.checkpoint.manifest import FileEntry, ParameterEntry
from pause_megatron.data.tokenizer.tokenizer import load_tokenizer
from pause_megatron.errors import DataError, PauseMegatronError
from pause_megatron.files.digest import file_digest
from pause_megatron.hf.export import export
from pause_megatron.hf.importing import import_folder

CANARY = "CANARY"


class Payload:
    """Leaves a file behind if anything unpickles it."""

    def __reduce__(self):
        return os.mkdir, (os.environ[CANARY],)


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch) -> Path:
    """Must not exist when a test is over; code in a folder makes it when it runs."""
    path = tmp_path / "executed"
    monkeypatch.setenv(CANARY, str(path))
    code = f"import os\nos.mkdir(os.environ[{CANARY!r}])\n"
    (tmp_path / "evil_module.py").write_text(code + "run = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return path


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """A tiny Llama folder, and the checkpoint that import makes of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("clean")
    config = LlamaConfig(
        vocab_size=600,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(str(folder / "hf"))
    train_model(folder / "hf" / "tokenizer.model")
    import_folder(folder / "hf", folder / "native")
    return folder


def pickled(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(pickle.dumps(Payload()))


def torch_saved(path: Path) -> None:
    torch.save({"model.embed_tokens.weight": Payload()}, path)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def index(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))


def header(path: Path, content: bytes, length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content)


def linked(path: Path, target: str | Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def moved_out(folder: Path, name: str) -> None:
    outside = folder.parent / f"outside-{name}"
    shutil.move(folder / name, outside)
    linked(folder / name, outside)


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch_saved(folder / "pytorch_model.bin")


def own_code(folder: Path, name: str, record: dict) -> None:
    (folder / "evil.py").write_text(f"import os\nos.mkdir(os.environ[{CANARY!r}])\nclass Evil: pass\n")
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | record))


def sparse(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


def overlapping(path: Path) -> None:
    tensors = load_file(path)
    entries = {
        name: {"dtype": "F32", "shape": list(t.shape), "data_offsets": [0, 4 * t.numel()]}
        for name, t in tensors.items()
    }
    header(path, json.dumps(entries).encode())


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pickle named model.safetensors": (lambda f: pickled(f / "model.safetensors"), "expected a safetensors file"),
    "a torch.save named model.safetensors": (
        lambda f: torch_saved(f / "model.safetensors"),
        "expected a safetensors file",
    ),
    "pickled weights": (only_pickle, "expected safetensors, got pickles"),
    "an index of pickles": (
        lambda f: (torch_saved(f / "x.pt"), index(f, "x.pt")),
        "expected names of .safetensors files",
    ),
    "an index that leaves the folder": (lambda f: index(f, "../model.safetensors"), "names of files in this folder"),
    "an index with an absolute path": (lambda f: index(f, "/etc/passwd"), "names of files in this folder"),
    "an index of something else": (lambda f: index(f, {"a": 1}), "index.json|names of files"),
    "a pickled index": (lambda f: pickled(f / "model.safetensors.index.json"), "expected JSON"),
    "a pickled config.json": (lambda f: pickled(f / "config.json"), "expected JSON"),
    "a pickled tokenizer.json": (lambda f: pickled(f / "tokenizer.json"), "tokenizer"),
    "a pickled tokenizer.model": (lambda f: pickled(f / "tokenizer.model"), "expected a SentencePiece model"),
    "a pickled tokenizer_config.json": (lambda f: pickled(f / "tokenizer_config.json"), "expected JSON"),
    "a model with code": (
        lambda f: own_code(
            f, "config.json", {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
        ),
        "auto_map requires code",
    ),
    "a config that asks for trust": (
        lambda f: own_code(f, "config.json", {"trust_remote_code": True}),
        "requires code",
    ),
    "a tokenizer with code": (
        lambda f: own_code(f, "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}),
        "auto_map requires code",
    ),
    "an adapter": (
        lambda f: ((f / "adapter_config.json").write_text("{}"), torch_saved(f / "adapter_model.bin")),
        "PEFT adapter",
    ),
    "a header of 2**63 bytes": (lambda f: header(f / "model.safetensors", b"{}", 2**63), "expected a safetensors file"),
    "a header longer than the file": (
        lambda f: header(f / "model.safetensors", b"{}", 10**8),
        "expected a safetensors",
    ),
    "a tensor of 2**60 bytes": (
        lambda f: header(
            f / "model.safetensors",
            b'{"a":{"dtype":"F32","shape":[288230376151711744],"data_offsets":[0,1152921504606846976]}}',
        ),
        "expected a safetensors file",
    ),
    "a header of brackets": (lambda f: header(f / "model.safetensors", b"[" * 100_000), "expected a safetensors file"),
    "tensors upon each other": (lambda f: overlapping(f / "model.safetensors"), "expected a safetensors file"),
    "a config of brackets": (lambda f: (f / "config.json").write_text("[" * 1_000_000), "expected JSON"),
    "a config of 10 GB": (lambda f: sparse(f / "config.json", 10**10), "expected at most"),
    "an index of 10 GB": (
        lambda f: (index(f, "x"), sparse(f / "model.safetensors.index.json", 10**10)),
        "expected at most",
    ),
    "10**12 layers": (lambda f: edit(f / "config.json", num_hidden_layers=10**12), "num_hidden_layers"),
    "2 billion layers": (lambda f: edit(f / "config.json", num_hidden_layers=2**31 - 1), "num_hidden_layers"),
    "a vocabulary of 2 billion": (lambda f: edit(f / "config.json", vocab_size=2**31 - 1), "expected shape"),
    "an infinite epsilon": (lambda f: edit(f / "config.json", rms_norm_eps=float("inf")), "rms_norm_eps"),
    "weights linked from elsewhere": (lambda f: moved_out(f, "model.safetensors"), "a link out of the folder"),
    "a tokenizer linked from elsewhere": (
        lambda f: linked(f / "tokenizer.model", "/etc/passwd"),
        "a link out of the folder",
    ),
    "a config linked from elsewhere": (lambda f: moved_out(f, "config.json"), "a link out of the folder"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_no_folder_does_harm(clean, tmp_path, canary, name):
    change, expected = FOLDERS[name]
    shutil.copytree(clean / "hf", tmp_path / "hf")
    change(tmp_path / "hf")
    with pytest.raises(PauseMegatronError, match=expected):
        import_folder(tmp_path / "hf", tmp_path / "native")
    assert not canary.exists() and not (tmp_path / "native").exists()


def test_a_chat_template_is_carried_on_as_bytes_and_not_run(clean, tmp_path, canary, monkeypatch):
    monkeypatch.setattr("jinja2.Environment.from_string", lambda *_, **__: pytest.fail("a template was compiled"))
    shutil.copytree(clean / "hf", tmp_path / "hf")
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (tmp_path / "hf" / "chat_template.jinja").write_text(template)
    import_folder(tmp_path / "hf", tmp_path / "native")
    export(tmp_path / "native", tmp_path / "out")
    for folder in (tmp_path / "native" / "tokenizer", tmp_path / "out"):
        assert (folder / "chat_template.jinja").read_text() == template
        assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == template
    assert not canary.exists()


def state(folder: Path) -> Path:
    return next(folder.glob("state-*"))


def kept_size(path: Path, change: Callable[[Path], None]) -> None:
    size = path.stat().st_size
    change(path)
    with open(path, "r+b") as file:
        file.truncate(size)


def other_tensors(path: Path, label: str, shape: tuple[int, ...]) -> None:
    path.unlink()
    save_file({label: torch.zeros(shape)}, path)


def huge_shape(folder: Path) -> Manifest:
    manifest = Manifest.load(folder)
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    return replace(manifest, parameters=manifest.parameters | {name: ParameterEntry((10**9, 10**9), 1)})


def yaml_edit(folder: Path, before: str, after: str) -> None:
    text = (folder / "config.yaml").read_text()
    assert before in text
    (folder / "config.yaml").write_text(text.replace(before, after))


def huge_pause_id(folder: Path) -> Manifest:
    """A pause id far out, and a manifest that claims rows up to it: filling the gap would take for ever."""
    edit(folder / "tokenizer" / "pause_tokenizer.json", pause_id=2**40)
    manifest = Manifest.load(folder)
    rows = {name: ParameterEntry((2**40 + 128, 16), 0) for name in VOCABULARY}
    return replace(manifest, parameters=manifest.parameters | rows)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{two}: &{two} [{', '.join([f'*{one}'] * 9)}]\n" for one, two in zip("abcdefghi", "bcdefghij", strict=True)
)
CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pickled state file": (lambda f: kept_size(state(f), pickled), "expected a safetensors file"),
    "a torch.save as state file": (lambda f: kept_size(state(f), torch_saved), "expected a safetensors file"),
    "a state file with a header of 2**63 bytes": (
        lambda f: kept_size(state(f), lambda path: header(path, b"{}", 2**63)),
        "expected a safetensors file",
    ),
    "a state file of other tensors": (lambda f: other_tensors(state(f), "no label", (300, 300)), "KEY.PARAMETER.START"),
    "a state file without the parameters": (
        lambda f: other_tensors(state(f), "param|x|0", (90_000,)),
        "expected parameters of the manifest in the state files, got param x",
    ),
    "a state file linked from elsewhere": (
        lambda f: moved_out(f, state(f).name),
        "expected a file inside the checkpoint, got a link out of it",
    ),
    "a tokenizer linked from elsewhere": (
        lambda f: linked(f / "tokenizer" / "tokenizer.model", "/etc/passwd"),
        "expected a file inside the checkpoint, got a link out of it",
    ),
    "a pickled tokenizer": (lambda f: pickled(f / "tokenizer" / "tokenizer.model"), "expected a SentencePiece model"),
    "a pickled description": (
        lambda f: pickled(f / "tokenizer" / "pause_tokenizer.json"),
        "expected the description of a tokenizer",
    ),
    "a pickled config.yaml": (lambda f: pickled(f / "config.yaml"), "UTF-8|not YAML|config.yaml"),
    "a YAML object": (
        lambda f: yaml_edit(f, "seed: 1234", f"seed: !!python/object/apply:os.mkdir [{os.environ[CANARY]}]"),
        "expected plain data",
    ),
    "a YAML bomb": (lambda f: (f / "config.yaml").write_text(BOMB), "config.yaml"),
    "a config of 10 GB": (lambda f: sparse(f / "config.yaml", 10**10), "config.yaml"),
    "a billion layers": (lambda f: yaml_edit(f, "layers: 1", "layers: 1000000000"), "1,000,000,000 layers"),
    "a hidden size of 2**40": (lambda f: yaml_edit(f, "hidden: 16", f"hidden: {2**40}"), "expected shape"),
    "a pause id of 2**40": (huge_pause_id, r"expected elements .* got"),
    "a parameter of 10**18 elements": (huge_shape, r"expected elements .* got"),
    "a manifest that leaves the folder": (
        lambda f: replace(Manifest.load(f), files={"../../etc/passwd": FileEntry(1, "")}),
        "inside the checkpoint",
    ),
    "a pickled manifest": (lambda f: pickled(f / "manifest.json"), "expected a pause-megatron-checkpoint manifest"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_no_checkpoint_does_harm(clean, tmp_path, canary, name):
    """Sizes and digests are forged where the attack needs it: digests are no signatures."""
    change, expected = CHECKPOINTS[name]
    folder = tmp_path / "native"
    shutil.copytree(clean / "native", folder)
    manifest = Manifest.load(folder)
    changed = change(folder)
    if "manifest" not in name:
        manifest = changed if isinstance(changed, Manifest) else manifest
        if "10 GB" not in name:
            files = {n: FileEntry((folder / n).stat().st_size, file_digest(folder / n)) for n in manifest.files}
            manifest = replace(manifest, files=files)
        (folder / "manifest.json").write_text(manifest.dumps())
    elif isinstance(changed, Manifest):
        (folder / "manifest.json").write_text(changed.dumps())
    with pytest.raises(PauseMegatronError, match=expected):
        export(folder, tmp_path / "out")
    assert not canary.exists() and not (tmp_path / "out").exists()


def test_a_placement_policy_of_a_checkpoint_is_not_imported(clean, tmp_path, canary):
    """pause.placement names a module: allowed for the user's run, but not from another user's checkpoint."""
    folder = tmp_path / "native"
    shutil.copytree(clean / "native", folder)
    yaml_edit(folder, "placement: uniform", "placement: evil_module:run")
    files = {n: FileEntry((folder / n).stat().st_size, file_digest(folder / n)) for n in Manifest.load(folder).files}
    (folder / "manifest.json").write_text(replace(Manifest.load(folder), files=files).dumps())
    export(folder, tmp_path / "out")
    assert not canary.exists()


def test_a_tokenizer_folder_with_code_is_refused(tmp_path, canary):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    own_code(
        folder, "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    )
    own_code(folder, "config.json", {"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"})
    with pytest.raises(DataError, match="cannot load it"):
        load_tokenizer(folder)
    for name in ("tokenizer.json", "tokenizer.model"):
        pickled(folder / name)
        with pytest.raises(DataError, match=r"expected a (Hugging Face tokenizer|SentencePiece model)"):
            load_tokenizer(folder / name)
    assert not canary.exists()


def test_the_canary_sings(tmp_path, canary):
    """What is refused above would have run."""
    pickle.loads(pickle.dumps(Payload()))
    assert canary.exists()
