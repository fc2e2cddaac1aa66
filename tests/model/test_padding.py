"""What padding does to a model's numbers: told from rounding, in every dtype."""

import pytest
import torch
import transformers
from small_models import small_model
from torch import nn

from bdpo_plugin.model.padding import reach, try_padding
from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.model.traits import output_layer
from benchmarks import architectures
from benchmarks.architectures import NotTiny

TOKENS = torch.randint(5, 384, (64,), generator=torch.Generator().manual_seed(5))


def tiny(name):
    try:
        return architectures.tiny(name)
    except NotTiny as error:  # an architecture that this release of transformers does not have
        pytest.skip(str(error)[:80])


def found(model, *, autocast=False, ids=TOKENS, limit=256):
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    inputs["use_cache"] = False
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return try_padding(model, output_layer(model), inputs, ids, limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])
@pytest.mark.parametrize(
    ("name", "right"),
    [
        *(("deepseek_v32", True), ("glm_moe_dsa", True), ("prophetnet", True), ("cpmant", True)),
        *(("llama", False), ("mixtral", False), ("gpt_oss", False), ("deepseek_v3", False)),
        *(("mamba", False), ("lfm2", False), ("gemma3_text", False), ("bamba", False)),
    ],
)
def test_padding_is_told_from_rounding(name, right, dtype):
    model = tiny(name)
    if dtype == torch.bfloat16:
        model = model.bfloat16()
    effect = found(model, autocast=dtype == "autocast").right
    old = transformers.__version__.startswith("5.6") and name == "glm_moe_dsa"
    if old and dtype != torch.float32:
        pytest.xfail("its indexer changes as much by a rounding of the embeddings to bfloat16")
    assert effect.beyond_rounding == right
    assert (effect.nats > 0.2) == right


class Wide(nn.Module):
    """As a layer of experts with room for so many tokens of a row: more in a wider one."""

    def __init__(self, layer, room):
        super().__init__()
        self.layer, self.room = layer, room

    def forward(self, states):
        places = torch.arange(states.shape[1])[:, None]
        return self.layer(states) * (places < self.room * states.shape[1])


def test_few_tokens_that_change_are_seen_in_float32(tokenizer):
    model = small_model(tokenizer)
    assert not found(model).right.beyond_rounding
    model.model.layers[0].mlp = Wide(model.model.layers[0].mlp, 0.97)
    assert found(model).right.beyond_rounding


def test_the_side_is_told(tokenizer):
    """Positions that were learnt are those of the place in the row, where none are given."""
    padding = found(small_model(tokenizer, "gpt2"))
    assert padding.left.beyond_rounding
    assert not padding.right.beyond_rounding


def test_a_sequence_is_long_enough_to_show_it():
    """An indexer that keeps 80 tokens changes nothing in a row of 64."""
    model = tiny("deepseek_v32")
    for layer in model.model.layers:
        layer.self_attn.indexer.index_topk = 80
    ids = TOKENS.repeat(3)
    assert reach(model.config) == 8
    model.config.index_topk = 80
    assert reach(model.config) == 80
    assert found(model, ids=ids).right.beyond_rounding


def test_no_row_is_longer_than_the_model_has_room_for(tokenizer):
    model = small_model(tokenizer, "gpt2", max_position_embeddings=64)
    assert found(model, limit=64).left.beyond_rounding


def test_a_sequence_of_one_token(tokenizer):
    assert found(small_model(tokenizer), ids=TOKENS[:1]).right.nats == 0


def test_the_model_is_left_as_it_was(tokenizer):
    model = small_model(tokenizer).train()
    random = torch.get_rng_state()
    found(model)
    assert torch.equal(random, torch.get_rng_state())
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_two_batches_of_a_model_that_depends_on_it_are_made_as_wide(tokenizer):
    model = tiny("deepseek_v32")
    positions = torch.ones(1, 20, dtype=torch.bool)
    labels = TOKENS[1:21]

    def logps(width, reader, at_least=0):
        ids = nn.functional.pad(TOKENS[:20], (0, width - 20))[None]
        mask = nn.functional.pad(torch.ones(1, 20, dtype=torch.long), (0, width - 20))
        where = nn.functional.pad(positions, (0, width - 20))
        with torch.no_grad(), reader.padded_alike(at_least):
            read, _ = reader.token_statistics(
                model, where, labels, input_ids=ids, attention_mask=mask, use_cache=False
            )
        return read.logps

    reader = ResponseReader()
    wide = logps(40, reader)
    alone = logps(20, reader)
    if transformers.__version__.startswith("5.16"):  # later ones take no mask for one of ones
        assert (logps(20, reader, 20) - alone).abs().max() > 1e-4, "alone, it has no mask"
    assert (logps(20, reader) - wide).abs().max() > 0.1
    torch.testing.assert_close(logps(20, reader, 40), wide)
    assert reader.layouts["scoring"].padding["right"]["nats"] > 0.5


def test_a_model_that_cannot_read_so_long_a_row_is_not_stopped_by_the_trial():
    """The chunks of xLSTM, from 64 tokens on, are of two dtypes in bfloat16."""
    model, reader = tiny("xlstm").bfloat16(), ResponseReader()
    ids = TOKENS[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    can = reader.probe(model, inputs, torch.device("cpu"))
    assert can.padding.right.unknown.startswith("RuntimeError: expected m1 and m2")
    assert not can.padding.right.beyond_rounding
