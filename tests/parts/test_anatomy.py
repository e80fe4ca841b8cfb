"""What `Anatomy` finds in models built from tiny configs of many architectures, on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pegbox.errors import BadInput
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.anatomy_registry import ENTRIES, Entry, register
from pegbox.testing import tiny_llama

D = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GQA = {**D, "num_key_value_heads": 2}
GPT = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
Q, KV, SEPARATE, FUSED = (16, 16), (8, 16), {"q", "k", "v", "o"}, {"qkv", "o"}

# model_type: (auto class, config, stacks, embedding, head, attention roles, (heads, KV heads, size), MLP roles)
MODELS: dict[str, tuple[Any, ...]] = {
    "llama": ("CausalLM", {**GQA}, {"model.layers": 2}, "model.embed_tokens", "lm_head", SEPARATE, (4, 2, 4), "gud"),
    "mistral": ("CausalLM", {**GQA}, {"model.layers": 2}, "model.embed_tokens", "lm_head", SEPARATE, (4, 2, 4), "gud"),
    "qwen2": ("CausalLM", {**GQA}, {"model.layers": 2}, "model.embed_tokens", "lm_head", SEPARATE, (4, 2, 4), "gud"),
    "qwen3": (
        "CausalLM",
        {**GQA, "head_dim": 8},
        {"model.layers": 2},
        "model.embed_tokens",
        "lm_head",
        SEPARATE,
        (4, 2, 8),
        "gud",
    ),
    "gemma3_text": (
        "CausalLM",
        {**GQA, "head_dim": 4},
        {"model.layers": 2},
        "model.embed_tokens",
        "lm_head",
        SEPARATE,
        (4, 2, 4),
        "gud",
    ),
    "phi3": (
        "CausalLM",
        {**GQA, "pad_token_id": 0},
        {"model.layers": 2},
        "model.embed_tokens",
        "lm_head",
        FUSED,
        (4, 2, 4),
        "fd",
    ),
    "phi": ("CausalLM", D, {"model.layers": 2}, "model.embed_tokens", "lm_head", SEPARATE, (4, 4, 4), "ud"),
    "gpt2": ("CausalLM", GPT, {"transformer.h": 2}, "transformer.wte", "lm_head", FUSED, (4, 4, 4), "ud"),
    "gptj": (
        "CausalLM",
        {**GPT, "rotary_dim": 4},
        {"transformer.h": 2},
        "transformer.wte",
        "lm_head",
        SEPARATE,
        (4, 4, 4),
        "ud",
    ),
    "gpt_neox": ("CausalLM", D, {"gpt_neox.layers": 2}, "gpt_neox.embed_in", "lm_head", FUSED, (4, 4, 4), "ud"),
    "bloom": (
        "CausalLM",
        {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 4},
        {"transformer.h": 2},
        "transformer.word_embeddings",
        "lm_head",
        FUSED,
        (4, 4, 4),
        "ud",
    ),
    "falcon": ("CausalLM", D, {"transformer.h": 2}, "transformer.word_embeddings", "lm_head", FUSED, (4, 1, 4), "ud"),
    "opt": (
        "CausalLM",
        {**D, "ffn_dim": 32, "word_embed_proj_dim": 16},
        {"model.decoder.layers": 2},
        "model.decoder.embed_tokens",
        "lm_head",
        SEPARATE,
        (4, 4, 4),
        "ud",
    ),
    "bert": (
        "MaskedLM",
        D,
        {"bert.encoder.layer": 2},
        "bert.embeddings.word_embeddings",
        "cls.predictions.decoder",
        SEPARATE,
        (4, 4, 4),
        "ud",
    ),
    "roberta": (
        "SequenceClassification",
        D,
        {"roberta.encoder.layer": 2},
        "roberta.embeddings.word_embeddings",
        "classifier.out_proj",
        SEPARATE,
        (4, 4, 4),
        "ud",
    ),
    "distilbert": (
        "SequenceClassification",
        {"vocab_size": 64, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 4},
        {"distilbert.transformer.layer": 2},
        "distilbert.embeddings.word_embeddings",
        "classifier",
        SEPARATE,
        (4, 4, 4),
        "ud",
    ),
    "vit": (
        "ImageClassification",
        {**D, "image_size": 16, "patch_size": 8},
        {"vit.layers": 2},
        "vit.embeddings.patch_embeddings.projection",
        "classifier",
        SEPARATE,
        (4, 4, 4),
        "ud",
    ),
    "swin": (
        "ImageClassification",
        SWIN,
        {"swin.encoder.layers.0.blocks": 2, "swin.encoder.layers.1.blocks": 2},
        "swin.embeddings.patch_embeddings.projection",
        "classifier",
        SEPARATE,
        (2, 2, 4),
        "ud",
    ),
    "t5": (
        "Seq2SeqLM",
        {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4},
        {"encoder.block": 2, "decoder.block": 2},
        "shared",
        "lm_head",
        SEPARATE,
        (4, 4, 4),
        "ud",
    ),
}
MLP = {
    "gud": {"gate", "up", "down"},
    "ud": {"up", "down"},
    "fd": {"gate_up", "down"},
}


def build(model_type: str) -> nn.Module:
    import transformers

    auto, config, *_ = MODELS[model_type]
    cls = getattr(transformers, f"AutoModelFor{auto}")
    with torch.device("meta"):
        return cls.from_config(transformers.AutoConfig.for_model(model_type, **config))


@pytest.mark.parametrize("model_type", list(MODELS))
def test_parts_of_each_architecture(model_type):
    _, _, stacks, embedding, head, attention, heads, mlp = MODELS[model_type]
    anatomy = Anatomy.of(build(model_type))
    assert anatomy.stacks == stacks
    assert (anatomy.embedding, anatomy.head) == (embedding, head)
    assert anatomy.category(anatomy.head) == "head"
    first = anatomy.blocks[0]
    assert set(first.attentions[0].matrices) == attention
    assert (first.attentions[0].heads, first.attentions[0].kv_heads, first.attentions[0].head_size) == heads
    assert {piece.role for piece in first.mlp} == MLP[mlp]
    assert len(first.norms) >= (1 if model_type in ("phi", "gptj", "falcon") else 2)
    assert len(anatomy.blocks) == sum(stacks.values())


@pytest.mark.parametrize("model_type", list(MODELS))
def test_every_parameter_belongs_to_exactly_one_piece(model_type):
    model = build(model_type)
    held = [name for piece in Anatomy.of(model).pieces for name in piece.parameters]
    assert sorted(held) == sorted(name for name, _ in model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("model_type", list(MODELS))
def test_words_for_matrices_cover_the_blocks_linears(model_type):
    from transformers.pytorch_utils import Conv1D

    model = build(model_type)
    anatomy = Anatomy.of(model)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and anatomy.block_of(n)}
    assert set(anatomy.resolve("all-linear")) == linears == set(anatomy.resolve(["attention", "mlp"]))


def test_cross_attention_of_an_encoder_decoder():
    blocks = {block.stack: block for block in Anatomy.of(build("t5")).blocks}
    assert [a.cross for a in blocks["decoder.block"].attentions] == [False, True]
    assert [a.cross for a in blocks["encoder.block"].attentions] == [False]


def test_fused_rows_follow_the_layout():
    stacked = Anatomy.of(build("gpt2")).piece("transformer.h.0.attn.c_attn")
    assert stacked.transposed
    assert stacked.shape == (48, 16)
    assert stacked.rows("k").tolist() == list(range(16, 32))
    grouped = Anatomy.of(build("gpt_neox")).piece("gpt_neox.layers.0.attention.query_key_value")
    assert grouped.rows("q").tolist() == [h * 12 + i for h in range(4) for i in range(4)]
    assert grouped.rows("v").tolist() == [h * 12 + 8 + i for h in range(4) for i in range(4)]
    multi_query = Anatomy.of(build("falcon")).piece("transformer.h.0.self_attention.query_key_value")
    assert {part: multi_query.rows(part).numel() for part in "qkv"} == {"q": 16, "k": 4, "v": 4}
    phi = Anatomy.of(build("phi3"))
    assert phi.piece("model.layers.0.self_attn.qkv_proj").rows("v").tolist() == list(range(24, 32))
    assert phi.piece("model.layers.0.mlp.gate_up_proj").rows("up").tolist() == list(range(32, 64))
    with pytest.raises(BadInput, match="no part 'z'"):
        phi.piece("model.layers.0.mlp.gate_up_proj").rows("z")


def test_grouped_rows_are_what_the_model_computes_with():
    """Zeroing the rows called v makes GPT-NeoX's attention put out nothing but its bias."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **D)).eval()
    piece = Anatomy.of(model).piece("gpt_neox.layers.0.attention.query_key_value")
    module = model.get_submodule(piece.module)
    seen = []
    model.gpt_neox.layers[0].attention.dense.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        module.weight[piece.rows("v")] = 0
        module.bias[piece.rows("v")] = 0
        model(torch.arange(6)[None])
    assert seen[0].abs().max() == 0


def test_mixture_of_experts_has_routers_and_stacked_experts():
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **GQA, num_local_experts=4))
    anatomy = Anatomy.of(model)
    assert anatomy.category("model.layers.0.mlp.gate.weight") == "router"
    assert anatomy.piece("model.layers.1.mlp.experts.down_proj").role == "down"
    assert {p.role for p in anatomy.blocks[0].mlp} == {"gate_up", "down"}


def test_ties_are_named_once():
    anatomy = Anatomy.of(tiny_llama(tie_word_embeddings=True))
    assert anatomy.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert anatomy.weights(["embedding", "head"]) == ["model.embed_tokens.weight"]


def test_wrapped_models_give_the_bare_names(llama):
    import peft

    bare = Anatomy.of(llama)
    wrapped = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    )
    anatomy = Anatomy.of(wrapped)
    assert anatomy.pieces == bare.pieces
    assert anatomy.blocks == bare.blocks
    for name, parameter in wrapped.named_parameters():
        if "lora_" not in name and "modules_to_save" not in name:
            assert wrapped.get_parameter(anatomy.actual(anatomy.canonical(name))) is parameter
    assert anatomy.block_of("base_model.model.model.layers.1.mlp.down_proj.base_layer.weight") == ("model.layers", 1)
    assert Anatomy.of(torch.compile(tiny_llama())).pieces == bare.pieces


def test_a_plain_network_has_no_blocks():
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2, bias=False))
    anatomy = Anatomy.of(net)
    assert anatomy.stacks == {}
    assert anatomy.resolve("all-linear") == ["0", "2"]
    assert anatomy.parameters("all") == ["0.weight", "0.bias", "2.weight"]
    assert anatomy.block_of("0.weight") is None


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("attention", 8),
        (["q", "v"], 4),
        ("block 1", 7),
        ("block -1", 7),
        ("blocks 0-1", 14),
        ("blocks 0, -1", 14),
        ("q_proj", 2),
        ("self_attn.q_proj", 2),
        ("model.layers.0.mlp", 3),
        ("*.0.*_proj", 7),
        ("re:.*(up|down)_proj", 4),
        (".*(up|down)_proj", 4),
        ("mlp & block 0", 3),
        ("all-linear & not mlp", 8),
        (["attention", "not q"], 6),
        ("not mlp", 8),
        ("norm", 5),
        ("head", 1),
        ("embed_tokens", 1),
    ],
)
def test_words(llama, words, count):
    assert len(Anatomy.of(llama).resolve(words)) == count


def test_words_keep_the_models_order(llama):
    anatomy = Anatomy.of(llama)
    assert (
        anatomy.resolve(["mlp", "attention"]) == anatomy.resolve({"attention", "mlp"}) == anatomy.resolve("all-linear")
    )


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("q_prj", "Did you mean 'q_proj'"),
        ("block 7", "Blocks: model.layers 0-1"),
        ("x.*.y", "There are: categories attention"),
        ("re:(", "not a valid regular expression"),
        ("mlp & q", "'mlp & q' matches no module"),
        ([], "No module was named"),
        ("all & not all", "matches no module"),
        (["mlp", "not mlp"], "Nothing is left"),
    ],
)
def test_words_that_match_nothing_are_refused(llama, word, says):
    with pytest.raises(BadInput, match="(?s)" + says.replace("(", r"\(")):
        Anatomy.of(llama).resolve(word)


def test_a_fused_matrix_is_named_where_its_part_was_asked_for():
    with pytest.raises(BadInput, match="holds 'q' fused in 'qkv_proj'"):
        Anatomy.of(build("phi3")).resolve("q_proj")


def test_explain_folds_block_numbers(llama):
    text = Anatomy.of(llama).explain(["mlp", "not up"])
    assert "mlp: 6 modules (model.layers.{0-1}.mlp.gate_proj" in text
    assert text.endswith("together 4 modules")


def test_an_entry_can_be_registered():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.ModuleList(nn.ModuleDict({"x": nn.Linear(4, 4), "y": nn.Linear(4, 4)}) for _ in range(2))
            self.config = type("C", (), {"model_type": "odd"})()

    register("odd", Entry(roles={"^x$": "attention/o", "^y$": "mlp/up"}))
    try:
        anatomy = Anatomy.of(Odd())
        assert anatomy.resolve("attention") == ["a.0.x", "a.1.x"]
        assert anatomy.resolve("up") == ["a.0.y", "a.1.y"]
    finally:
        del ENTRIES["odd"]
