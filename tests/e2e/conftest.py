"""A tiny model in a folder, a cache of its own, and rows of every kind that a host needs."""

import json

import pytest

from pegbox.testing import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama(max_position_embeddings=1024).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(base, monkeypatch):
    monkeypatch.setenv("PEGBOX_CACHE", str(base / "cache"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")

    def write(name, records):
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")

    chat = [
        {"messages": [{"role": "user", "content": f"add {i} and 2"}, {"role": "assistant", "content": str(i + 2)}]}
        for i in range(24)
    ]
    write("chat.jsonl", chat)
    write("prefs.jsonl", [{"prompt": f"add {i}", "chosen": str(i + 1), "rejected": "no"} for i in range(8)])
    write("labels.jsonl", [{"text": f"a {'good' if i % 2 else 'bad'} day {i}", "label": i % 2} for i in range(24)])
    write("broken.jsonl", [{"messages": [{"role": "user", "content": "only a question"}]}])
    return folder
