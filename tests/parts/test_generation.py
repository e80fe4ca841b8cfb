"""Generation: batches equal single answers, stops, modes and randomness are left alone; endpoint and script."""

from __future__ import annotations

import http.server
import json
import threading

import pytest
import torch

from pegbox.errors import BadInput, RunFailed
from pegbox.parts.generation import (
    Endpoint,
    LocalModel,
    Sampling,
    Scripted,
    as_evaluated,
    encode_prompt,
    generate,
    stop_ids,
    stream,
)


def ask(text):
    return [{"role": "user", "content": text}]


def greedy_by_hand(model, tokenizer, messages, n, ends):
    ids = encode_prompt(tokenizer, messages)
    new = []
    with torch.no_grad():
        for _ in range(n):
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
            if new[-1] in ends:
                break
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batched_answers_equal_a_plain_greedy_loop(llama, tokenizer, batch_size):
    prompts = [ask("a" * n) for n in (1, 9, 4, 30, 2)]
    wanted = [greedy_by_hand(llama, tokenizer, p, 12, stop_ids(tokenizer, llama)) for p in prompts]
    assert generate(llama, tokenizer, prompts, max_new_tokens=12, batch_size=batch_size) == wanted


def test_a_shared_beginning_changes_no_answer(llama, tokenizer):
    begin = "a long instruction that every prompt begins with: "
    prompts = [ask(begin + tail) for tail in ("x", "another tail", "yy yy", "")]
    wanted = [greedy_by_hand(llama, tokenizer, p, 10, stop_ids(tokenizer, llama)) for p in prompts]
    seen = []
    handle = llama.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    assert generate(llama, tokenizer, prompts, max_new_tokens=10, batch_size=2) == wanted
    handle.remove()
    assert seen[0][0] == 1
    assert seen[0][1] > len(begin)  # once, and the batches begin behind it
    assert max(width for _, width in seen[1:]) < seen[0][1]


def test_stops_hold_the_end_of_turn_and_the_configs_ids(llama, tokenizer):
    assert stop_ids(tokenizer) == [257]
    llama.generation_config.eos_token_id = [7, 257]
    assert stop_ids(tokenizer, llama) == [7, 257]
    tokenizer_without = type("T", (), {"eos_token_id": None, "chat_template": None})()
    assert stop_ids(tokenizer_without) == []


def test_an_end_of_turn_that_is_not_eos_is_found():
    from pegbox.testing import tiny_tokenizer

    other = tiny_tokenizer()
    other.eos_token = "<unk>"
    assert stop_ids(other) == [257, 259]


def test_generation_ends_at_a_stop(llama, tokenizer):
    first = generate(llama, tokenizer, [ask("hi")], max_new_tokens=8)[0]
    ids = tokenizer(first)["input_ids"]
    cut = generate(llama, tokenizer, [ask("hi")], max_new_tokens=8, stop=[ids[3]])[0]
    assert tokenizer(cut)["input_ids"] == ids[: ids.index(ids[3]) + 1]


def test_modes_and_global_randomness_are_left_alone(llama, tokenizer):
    llama.train()
    llama.model.layers[1].eval()
    modes = [m.training for m in llama.modules()]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    warm = Sampling(temperature=1.0, seed=5)
    one = generate(llama, tokenizer, [ask("hi")] * 2, max_new_tokens=6, sampling=warm)
    assert torch.equal(before, torch.get_rng_state())
    assert [m.training for m in llama.modules()] == modes
    assert one == generate(llama, tokenizer, [ask("hi")] * 2, max_new_tokens=6, sampling=warm)
    assert one != generate(llama, tokenizer, [ask("hi")] * 2, max_new_tokens=6, sampling=Sampling(1.0, seed=6))


def test_modes_come_back_after_an_error(llama):
    llama.train()
    with pytest.raises(ZeroDivisionError), as_evaluated(llama):
        _ = 1 / (0 if not llama.training else 1)
    assert all(m.training for m in llama.modules())


def test_works_through_peft(llama, tokenizer):
    from peft import LoraConfig, get_peft_model

    wanted = generate(llama, tokenizer, [ask("hi"), ask("there")], max_new_tokens=5)
    tuned = get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj"])).train()
    assert generate(tuned, tokenizer, [ask("hi"), ask("there")], max_new_tokens=5) == wanted


def test_raw_prompts_and_long_ones(llama, tokenizer):
    raw = [{"role": "raw", "content": "abc"}]
    assert encode_prompt(tokenizer, raw) == tokenizer("abc")["input_ids"]
    long = [{"role": "raw", "content": "x" * 50 + "abc"}]
    assert generate(llama, tokenizer, [long], max_new_tokens=4, max_prompt=3) == generate(
        llama, tokenizer, [raw], max_new_tokens=4
    )


def test_what_cannot_be_answered_is_refused(llama, tokenizer):
    from pegbox.testing import tiny_tokenizer

    with pytest.raises(BadInput, match="empty message list"):
        generate(llama, tokenizer, [[]])
    with pytest.raises(BadInput, match="leaves no room"):
        generate(llama, tokenizer, [ask("x")], max_new_tokens=512)
    with pytest.raises(BadInput, match="temperature must be >= 0"):
        Sampling(temperature=-1)
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(BadInput, match="no chat template"):
        generate(llama, bare, [ask("x")])


def test_stream_gives_the_same_text_in_pieces(llama, tokenizer):
    whole = generate(llama, tokenizer, [ask("hi")], max_new_tokens=20)[0]
    llama.train()
    pieces = list(stream(llama, tokenizer, ask("hi"), max_new_tokens=20))
    assert "".join(pieces) == whole
    assert llama.training


def test_a_closed_stream_stops_the_model(llama, tokenizer):
    steps = []
    llama.register_forward_hook(lambda *_: steps.append(1))
    pieces = stream(llama, tokenizer, [{"role": "raw", "content": "a b c"}], max_new_tokens=400)
    next(pieces)
    pieces.close()
    assert len(steps) < 400


def test_a_failing_stream_raises(llama, tokenizer):
    def fail(*_):
        raise ValueError("no memory")

    llama.model.layers[0].register_forward_hook(fail)
    with pytest.raises(RunFailed, match="no memory"):
        list(stream(llama, tokenizer, ask("hi"), max_new_tokens=4))


def test_script():
    script = Scripted({"hi": "hello"}, default="?")
    assert script([ask("hi"), ask("what")], 5) == ["hello", "?"]
    assert len(script.asked) == 2
    with pytest.raises(BadInput, match="no answer"):
        Scripted({})([ask("hi")])


class Server(http.server.BaseHTTPRequestHandler):
    failures: list[int] = []
    seen: list[tuple[str, dict, str | None]] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, body, self.headers.get("Authorization")))
        if self.failures:
            self.send_error(self.failures.pop())
            return
        text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        choice = {"text": text} if "prompt" in body else {"message": {"content": text.upper()}}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [choice]}).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Server.failures, Server.seen = [], []
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1"
    httpd.shutdown()
    httpd.server_close()


def test_endpoint_answers_in_order_and_never_shows_its_key(server):
    endpoint = Endpoint(server, "m", key="s3cret", sampling=Sampling(0.5, seed=3))
    assert endpoint([ask("a"), [{"role": "raw", "content": "b"}], ask("c")], 9) == ["A", "b", "C"]
    _, body, key = next(s for s in Server.seen if s[0].endswith("/chat/completions"))
    assert (body["max_tokens"], body["temperature"], body["seed"], key) == (9, 0.5, 3, "Bearer s3cret")
    assert "s3cret" not in repr(endpoint)


def test_endpoint_tries_again_on_passing_errors_only(server):
    Server.failures = [500, 429]
    assert Endpoint(server, "m", wait=0.01)([ask("a")]) == ["A"]
    Server.failures = [404]
    with pytest.raises(RunFailed, match="404"):
        Endpoint(server, "m", wait=0.01)([ask("a")])
    assert len(Server.seen) == 4
    with pytest.raises(RunFailed, match="after 2 attempt"):
        Endpoint("http://127.0.0.1:9/v1", "m", wait=0.01, retries=1)([ask("a")])


def test_local_model_is_a_responder(llama, tokenizer):
    assert LocalModel(llama, tokenizer)([ask("hi")], 5) == generate(llama, tokenizer, [ask("hi")], max_new_tokens=5)
