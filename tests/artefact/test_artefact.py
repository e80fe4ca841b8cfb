"""An artefact is written whole, checked when read, and gives back the very model that was saved."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import peft
import pytest
import torch

from pegbox.artefact import ArtefactWriter, CardInfo, DataEntry, artefact_folder, load_artefact, read, root_of, settle
from pegbox.artefact import manifest as manifests
from pegbox.errors import BadInput, Corrupt, RunFailed, Unsupported, WrongBase
from pegbox.models import load, resolve
from pegbox.parts.files import write_tensors
from pegbox.parts.results import Measurement, Metrics, Score
from pegbox.prepare.base import PREPARE, Preparation
from pegbox.testing import tiny_llama, tiny_tokenizer

from .helpers import LORA, tuned_model

IDS = torch.arange(14)[None]  # (B=1, T=14)


def written(source, folder: Path, block: Any = LORA, seed: int = 0, **options: Any):
    tuner, model = tuned_model(source, block, seed)
    with ArtefactWriter(folder, source) as writer:
        writer.add_tuner(tuner, model, **options)
        writer.add_tokenizer(tiny_tokenizer())
    return model


@pytest.mark.parametrize("block", [LORA, {"kind": "full"}])
def test_what_was_saved_is_what_is_loaded(source, tmp_path, block):
    model = written(source, tmp_path / "run" / "artefact", block)
    loaded, tokenizer = load_artefact(tmp_path / "run")
    assert torch.equal(model(IDS).logits, loaded(IDS).logits)
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id == 257
    assert read(tmp_path / "run").root.fingerprint == source.fingerprint


def test_peft_alone_loads_an_adapter_part(source, tmp_path):
    model = written(source, tmp_path / "artefact")
    by_peft = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "artefact" / "adapter").eval()
    assert torch.equal(model(IDS).logits, by_peft(IDS).logits)


def test_the_cards_loading_lines_run_as_they_stand(source, tmp_path):
    model = written(source, tmp_path / "artefact")
    card = (tmp_path / "artefact" / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2
    assert all(block.startswith("import pegbox") for block in blocks)
    torch.save(model(IDS).logits, tmp_path / "expected")
    check = f"import torch\nx = torch.load({str(tmp_path / 'expected')!r})\n"
    check += "assert torch.equal(model.eval()(torch.arange(14)[None]).logits, x) and tokenizer is not None\n"
    script = "\n".join(block + check for block in blocks)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "artefact", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_card_says_where_it_comes_from(source, tmp_path):
    score = Score(name="exact", value=0.75, low=0.7, high=0.8, n=100)
    before = {"target": Measurement(suite="target", scores={"exact": score.model_copy(update={"value": 0.1})})}
    after = {"target": Measurement(suite="target", scores={"exact": score})}
    tuner, model = tuned_model(source, LORA)
    with ArtefactWriter(tmp_path / "artefact", root_of(source, precision="bf16")) as writer:
        writer.add_tuner(tuner, model)
        writer.add_card(
            CardInfo(
                title="A test",
                recipe="lora",
                recipe_yaml="tuner: {kind: lora}",
                data=[DataEntry(name="my.jsonl", rows=7, sha256="abc123", licence="CC0")],
                metrics=Metrics(before=before, after=after),
                licence="MIT",
            )
        )
    card = (tmp_path / "artefact" / "README.md").read_text()
    for words in (source.fingerprint, "abc123", "7 rows", "CC0", "0.75", "0.1", "0.7 to 0.8", "bf16", "tuner: {kind"):
        assert words in card
    assert 'license: "mit"' in card.split("---")[1]
    assert read(tmp_path / "artefact").info["recipe"] == "lora"


def test_a_tuned_model_is_refused_as_a_base_and_a_wrong_one_with_both_fingerprints(source, tmp_path):
    written(source, tmp_path / "artefact")
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    other = resolve(tmp_path / "other")
    for base in (other, str(other.path), load(other, device="cpu").model, tiny_llama(seed=1)):
        with pytest.raises(WrongBase) as caught:
            load_artefact(tmp_path / "artefact", base=base)
        assert source.fingerprint in str(caught.value)
        assert other.fingerprint in str(caught.value)
    _, tuned = tuned_model(source, LORA)
    with pytest.raises(BadInput, match="adapter attached"):
        load_artefact(tmp_path / "artefact", base=tuned)


def test_a_copy_of_the_base_elsewhere_resharded_or_in_memory_serves(source, tmp_path):
    model = written(source, tmp_path / "artefact")
    tiny_llama().save_pretrained(tmp_path / "copy", max_shard_size="20KB")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(BadInput, match="base="):
        load_artefact(tmp_path / "artefact")
    for base in (tmp_path / "copy", tiny_llama()):
        assert torch.equal(load_artefact(tmp_path / "artefact", base=base).model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_an_artefact_loads_on_its_base_in_another_precision(source, tmp_path, precision):
    model = written(source, tmp_path / "artefact")
    loaded = load_artefact(tmp_path / "artefact", precision=precision, device="cpu").model
    assert (loaded(IDS).logits.float() - model(IDS).logits).abs().max() < 0.5


def test_a_run_on_nf4_loads_on_nf4_by_itself(source, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    tuner, model = tuned_model(source, LORA)
    with ArtefactWriter(tmp_path / "artefact", root_of(source, precision="nf4")) as writer:
        writer.add_tuner(tuner, model)
    loaded = load_artefact(tmp_path / "artefact", device="cpu").model
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in loaded.modules())
    assert 'precision="nf4"' in (tmp_path / "artefact" / "README.md").read_text()


# ---- damage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "tokenizer/tokenizer.json"])
def test_a_damaged_file_is_named(source, tmp_path, name, damage):
    written(source, tmp_path / "artefact")
    path = tmp_path / "artefact" / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(bytes(raw) if damage == "flip" else bytes(raw[:-3]))
    with pytest.raises(Corrupt, match=path.name):
        load_artefact(tmp_path / "artefact")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(version=99), "Upgrade"),
        (lambda m: m.pop("root"), "damaged"),
        (lambda m: m["parts"][0].update(path="../../etc"), "outside itself"),
        (lambda m: m["parts"][0]["files"].update({"/etc/passwd": {"size": 1, "sha256": "x"}}), "outside itself"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(source, tmp_path, change, words):
    written(source, tmp_path / "artefact")
    path = tmp_path / "artefact" / manifests.MANIFEST
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(Corrupt, match=words):
        read(tmp_path / "artefact")


def test_an_edited_card_is_no_damage(source, tmp_path):
    written(source, tmp_path / "artefact")
    (tmp_path / "artefact" / "README.md").write_text("mine")
    read(tmp_path / "artefact")


def test_nothing_there_says_so(tmp_path):
    with pytest.raises(BadInput, match="holds no artefact"):
        artefact_folder(tmp_path)


def test_pickles_are_not_let_in(source, tmp_path):
    with pytest.raises(BadInput, match=r"x\.bin is neither"), ArtefactWriter(tmp_path / "artefact", source) as writer:
        writer.add("data", lambda folder: torch.save({}, folder / "x.bin"))
    assert not (tmp_path / "artefact").exists()


# ---- writing ----------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_former_artefact(source, tmp_path, monkeypatch):
    model = written(source, tmp_path / "artefact")
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailed, match="No space left"):
        written(source, tmp_path / "artefact", seed=1)
    monkeypatch.undo()
    assert torch.equal(load_artefact(tmp_path / "artefact").model(IDS).logits, model(IDS).logits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artefact", "base"]


def test_a_process_killed_at_any_write_leaves_the_former_artefact_or_the_new_one(source, tmp_path):
    """Every call that changes the file system is a possible moment of death."""
    written(source, tmp_path / "artefact")
    old = read(tmp_path / "artefact").state
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom pegbox.artefact import ArtefactWriter, read\n"
        "from pegbox.models import resolve\nfrom pegbox.parts.files import write_text\n"
        "source = resolve(sys.argv[1])\nsource.fingerprint\n"
        "for death in range(1, 60):\n"
        "    if os.fork():\n        status = os.wait()[1]\n        sys.stdout.write(str(status) + ' ')\n"
        "        read(sys.argv[2])\n"
        "        if status == 0:\n            break\n        continue\n"
        "    left = [death]\n"
        "    def counted(call):\n"
        "        def inner(*a, **k):\n            left[0] -= 1\n"
        "            if left[0] == 0:\n                os._exit(9)\n"
        "            return call(*a, **k)\n        return inner\n"
        "    os.rename, os.replace, os.fsync = counted(os.rename), counted(os.replace), counted(os.fsync)\n"
        "    with ArtefactWriter(sys.argv[2], source) as writer:\n"
        "        writer.add('json', lambda f: write_text(f / 'x.json', '{}'))\n"
        "    os._exit(0)\n"
    )
    place = tmp_path / "artefact"
    done = subprocess.run([sys.executable, "-c", script, str(source.path), str(place)], capture_output=True, text=True)
    statuses = done.stdout.split()
    assert done.returncode == 0, done.stderr
    assert statuses[-1] == "0"
    assert len(statuses) > 8
    assert read(place).state != old


@pytest.mark.parametrize("death", range(1, 14))
def test_after_a_death_the_artefact_reads(source, tmp_path, monkeypatch, death):
    written(source, tmp_path / "artefact")
    old = read(tmp_path / "artefact").state
    left = [death]

    def dying(call):
        def inner(*args, **kwargs):
            left[0] -= 1
            if left[0] <= 0:  # a dead process does nothing more, not even clean up
                raise KeyboardInterrupt
            return call(*args, **kwargs)

        return inner

    for name in ("rename", "replace", "fsync"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    monkeypatch.setattr("shutil.rmtree", lambda *a, **k: None)
    try:
        with ArtefactWriter(tmp_path / "artefact", source) as writer:
            writer.add("json", lambda f: (f / "x.json").write_text("{}") and None)
        ended = True
    except KeyboardInterrupt:
        ended = False
    monkeypatch.undo()
    assert (read(tmp_path / "artefact").state != old) >= ended


def test_parts_are_numbered_and_known(source, tmp_path):
    with ArtefactWriter(tmp_path / "artefact", source) as writer:
        for _ in range(3):
            writer.add("json", lambda f: (f / "x.json").write_text("{}") and None)
        with pytest.raises(BadInput, match="Unknown part kind"):
            writer.add("pickle", lambda f: None)  # type: ignore[arg-type]
    assert [part.path for part in read(tmp_path / "artefact").parts] == ["json", "json-2", "json-3"]


# ---- chains and composition -------------------------------------------------------------------------------------


def difference_part(writer, values: float, additive: bool) -> None:
    writer.add(
        "delta", lambda f: write_tensors(f / "d.safetensors", {"x": torch.full((2,), values)}), additive=additive
    )


def test_a_part_fits_exactly_its_parent_unless_it_is_additive(source, tmp_path):
    for name, additive in (("a", True), ("b", True), ("c", False)):
        with ArtefactWriter(tmp_path / name, source) as writer:
            difference_part(writer, float(ord(name)), additive)
    whole = [read(tmp_path / name) for name in "abc"]
    joined = lambda *names: whole[0].model_copy(  # noqa: E731
        update={"parts": [p for n in names for p in whole["abc".index(n)].parts]}
    )
    for names in ("ab", "ba", "c", "ca"):
        manifests.check_chain(joined(*names))
    with pytest.raises(WrongBase, match="additive"):
        manifests.check_chain(joined("a", "c"))


def test_an_artefact_continues_from_another(source, tmp_path):
    written(source, tmp_path / "first")
    before = read(tmp_path / "first")
    with ArtefactWriter(tmp_path / "second", source, start=tmp_path / "first") as writer:
        difference_part(writer, 1.0, additive=False)
    after = read(tmp_path / "second")
    assert after.parts[0] == before.parts[0]
    assert after.parts[1].parent == before.state
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    with (
        pytest.raises(WrongBase),
        ArtefactWriter(tmp_path / "x", resolve(tmp_path / "other"), start=tmp_path / "first"),
    ):
        pass
    assert not (tmp_path / "x").exists()


def test_two_additive_adapters_over_one_root_add_up(source, tmp_path):
    one = {"kind": "lora", "r": 2, "target_modules": ["q_proj"]}
    written(source, tmp_path / "a", one, seed=1, additive=True)
    written(source, tmp_path / "b", one, seed=2, additive=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    base = tiny_llama().state_dict()[name]
    single = [settle(load_artefact(tmp_path / n).model).state_dict()[name] - base for n in "ab"]
    both = settle(load_artefact([tmp_path / "a", tmp_path / "b"]).model).state_dict()[name]
    assert torch.allclose(both, base + single[0] + single[1], atol=1e-6)
    swapped = settle(load_artefact([tmp_path / "b", tmp_path / "a"]).model).state_dict()[name]
    assert torch.allclose(both, swapped, atol=1e-6)


def test_a_prompt_cannot_carry_a_further_part(source, tmp_path):
    written(source, tmp_path / "a", {"kind": "prompt_tuning", "num_virtual_tokens": 3}, additive=True)
    written(source, tmp_path / "b", LORA, additive=True)
    with pytest.raises(Unsupported, match="merge"):
        load_artefact([tmp_path / "a", tmp_path / "b"])


class Scaled(Preparation):
    """A preparation for the tests: the head times a factor, recorded and replayed."""

    kind: Literal["test-scaled"] = "test-scaled"
    factor: float = 2.0
    keeps_function: ClassVar[bool] = False

    def apply(self, model, batches, ctx):
        with torch.no_grad():
            model.lm_head.weight.mul_(self.factor)
        return {"factor": self.factor}

    def save(self, record, folder):
        (folder / "record.json").write_text(json.dumps(record))

    def replay(self, model, folder):
        with torch.no_grad():
            model.lm_head.weight.mul_(json.loads((folder / "record.json").read_text())["factor"])


def test_preparations_are_replayed_before_the_update(source, tmp_path):
    PREPARE.register(Scaled)
    bare = load(source, device="cpu").model
    preparation = Scaled(factor=3.0)
    record = preparation.apply(bare, list, None)
    expected = bare(IDS).logits
    with ArtefactWriter(tmp_path / "artefact", source) as writer:
        assert writer.add_preparation(preparation, record).kind == "prep"
    assert torch.equal(load_artefact(tmp_path / "artefact").model(IDS).logits, expected)


def test_whole_modules_come_back_and_strangers_are_refused(source, tmp_path):
    new = torch.randn(32)
    for name, fits in (("model.norm.weight", True), ("model.nothing.weight", False)):
        with ArtefactWriter(tmp_path / str(fits), source) as writer:
            writer.add("modules", lambda f, n=name: write_tensors(f / "m.safetensors", {n: new}))
    assert torch.equal(load_artefact(tmp_path / "True").model.model.norm.weight, new)
    with pytest.raises(Corrupt, match=r"model\.nothing"):
        load_artefact(tmp_path / "False")
