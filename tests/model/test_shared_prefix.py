"""Batches in a row, without their padding: when, and that nothing else changes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_model
from transformers import AutoModelForCausalLM, FalconConfig, Lfm2Config

from bdpo_plugin.demo.tiny import build_model
from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.model.shared_prefix import pack, plan_row, prefix_groups
from bdpo_plugin.model.traits import RowRules, Traits, row_rules
from bdpo_plugin.model.tree_attention import PrefixGroup


@pytest.fixture
def batch(tokenizer):
    """Rows of 30, 9 and 6 tokens, the second left-padded; the last four of each are read."""
    torch.manual_seed(0)
    ids = torch.randint(5, len(tokenizer), (3, 30))
    mask, positions = torch.zeros(2, 3, 30, dtype=torch.bool)
    for row, (start, end) in enumerate([(0, 30), (21, 30), (0, 6)]):
        mask[row, start:end] = True
        positions[row, end - 5 : end - 1] = True
    labels = ids.roll(-1, dims=1)[positions]
    return {"input_ids": ids, "attention_mask": mask.long()}, positions, labels


def rules_of(model, inputs):
    rules = row_rules(model, Traits.of(model), inputs)
    return None if isinstance(rules, str) else rules


def widths(model, function):
    """The shapes of the token ids that the model was given while `function` ran; its result."""
    seen = []

    def hook(_, args, kwargs):
        seen.append(tuple(kwargs["input_ids"].shape))

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        return function(), seen
    finally:
        handle.remove()


def logps(reader, model, batch):
    inputs, positions, labels = batch
    return reader.token_statistics(model, positions, labels, **inputs)[0].logps


def plain_logps(model, batch):
    inputs, positions, labels = batch
    real = inputs["attention_mask"].cumsum(1) - 1  # of the left-padded row too
    logits = model(**inputs, position_ids=real.clamp(min=0)).logits[positions]
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


@pytest.mark.parametrize("architecture", ["tied", "gpt2", "moe", "logit_scale"])
def test_the_sequences_are_kept_apart(tokenizer, batch, architecture):
    model = small_model(tokenizer, architecture)
    model.set_attn_implementation("sdpa")
    mine, seen = widths(model, lambda: logps(ResponseReader(), model, batch))
    assert seen[-1] == (1, 45)
    torch.testing.assert_close(mine, plain_logps(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "attention"), [("tied", "eager"), ("soft-capped", "eager")]
)
def test_eager_attention_keeps_its_padding(tokenizer, batch, architecture, attention):
    """It could be told apart by a mask alone, as large as the row's length squared."""
    model = small_model(tokenizer, architecture)
    model.set_attn_implementation("eager")
    inputs = batch[0] | {"position_ids": (batch[0]["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    reader = ResponseReader()
    mine, seen = widths(model, lambda: logps(reader, model, (inputs, *batch[1:])))
    assert seen[-1] == batch[0]["input_ids"].shape
    assert "takes no common beginning" in reader.layouts["training"].why
    torch.testing.assert_close(mine, plain_logps(model, batch), rtol=1e-5, atol=1e-5)


def test_sliding_windows(tokenizer, batch):
    model = small_model(tokenizer, "moe", sliding_window=3)
    mine, seen = widths(model, lambda: logps(ResponseReader(), model, batch))
    assert seen[-1] == (1, 45)
    torch.testing.assert_close(mine, plain_logps(model, batch), rtol=1e-5, atol=1e-5)


def test_a_model_that_mixes_neighbours_gets_its_padding(tokenizer, batch):
    """The short convolutions of LFM2 take position ids, but do not look at them."""
    model = build_model(
        tokenizer,
        config=Lfm2Config,
        hidden_size=32,
        layers=2,
        heads=2,
        layer_types=["conv", "full_attention"],
    ).eval()
    for name, weight in model.named_parameters():
        if "conv" in name:
            weight.data.mul_(20)  # as new they hardly do anything
    right = tuple(x[[0, 2]] for x in (*batch[0].values(), batch[1]))
    inputs = dict(zip(batch[0], right[:2], strict=True))
    batch = inputs, right[2], inputs["input_ids"].roll(-1, dims=1)[right[2]]
    mine, seen = widths(model, lambda: logps(ResponseReader(), model, batch))
    torch.testing.assert_close(mine, plain_logps(model, batch), rtol=1e-5, atol=1e-5)
    assert (1, 36) not in seen
    assert seen[-1] == (2, 30)


def test_a_model_that_cannot_read_our_mask_does_not_share(tokenizer, pairs):
    """Falcon with ALiBi makes its biases from the mask, whose two dimensions it takes apart."""
    config = FalconConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        alibi=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    inputs, positions, labels = pairs
    mine, seen = widths(model, lambda: logps(ResponseReader(), model, pairs))
    assert seen[-1][0] * seen[-1][1] >= int(inputs["attention_mask"].sum())
    wanted = model(**inputs).logits[positions].log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key", ["attention_chunk_size", "attn_temperature_tuning"])
def test_layers_that_look_at_the_place_in_the_row_are_not_packed(tokenizer, batch, key):
    """As Llama 4's, from 8,192 tokens on: a trial on a few would not show it."""
    model = small_model(tokenizer)
    setattr(model.config, key, 8192)
    assert not rules_of(model, batch[0])


def test_no_row_is_wider_than_the_positions_that_were_learnt(tokenizer):
    few = {"max_position_embeddings": 64}
    assert plan_of(small_model(tokenizer, "gpt2"), padded(60, 5)) == [PrefixGroup((0, 1), 5)]
    assert plan_of(small_model(tokenizer, "gpt2", **few), padded(60, 5)) == [PrefixGroup((0, 1), 5)]
    longer = padded(60, 50)
    longer["input_ids"][1] += 1
    assert plan_of(small_model(tokenizer, "gpt2", **few), longer) is None
    assert plan_of(small_model(tokenizer, **few), longer) is not None, "rotary"


def test_compiled_models_and_inputs_of_other_kinds_are_not_packed(tokenizer, batch):
    model = small_model(tokenizer)
    inputs = batch[0]
    assert rules_of(model, inputs)
    assert not rules_of(model, inputs | {"token_type_ids": inputs["input_ids"]})
    assert not rules_of(torch.compile(model), inputs)
    model.compile()
    assert not rules_of(model, inputs)


def plan_of(model, inputs):
    model.set_attn_implementation("sdpa")
    mask = inputs["attention_mask"].bool()
    return plan_row(rules_of(model, inputs), inputs["input_ids"], mask)


def padded(*lengths):
    width = max(lengths)
    rows = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    return {"input_ids": rows.clone(), "attention_mask": rows}


def test_a_row_only_where_it_saves_something(tokenizer):
    model = small_model(tokenizer)
    apart = padded(30, 30)
    apart["input_ids"][1] += 1
    assert plan_of(model, apart) is None
    apart["input_ids"][1] -= 1
    assert plan_of(model, apart) == [PrefixGroup((0, 1), 30)]


def test_a_window_of_a_loss_that_counts_the_tokens_of_a_mask(tokenizer, batch):
    inputs = batch[0] | {"output_router_logits": True}
    model = small_model(tokenizer, "moe", sliding_window=8)
    model.set_attn_implementation("sdpa")
    assert rules_of(model, batch[0])
    assert not rules_of(model, inputs)


def test_pack(batch):
    inputs, positions, labels = batch
    mask = inputs["attention_mask"].bool()
    rules = RowRules(widest=100, longest=100, each_once=False)
    groups = [PrefixGroup((0,)), PrefixGroup((1,)), PrefixGroup((2,))]
    together, packed, order = pack(positions, inputs, mask, groups, rules)
    assert packed["input_ids"].shape == packed["position_ids"].shape == together.shape == (1, 45)
    starts = (packed["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert starts == [0, 30, 39]
    assert order.tolist() == list(range(len(labels)))
    after = packed["input_ids"].roll(-1, dims=1)[together]
    assert after.tolist() == labels.tolist()
    together, packed, order = pack(positions, inputs, mask, [groups[i] for i in (1, 2, 0)], rules)
    after = packed["input_ids"].roll(-1, dims=1)[together]
    assert after.tolist() != labels.tolist()
    assert after[order].tolist() == labels.tolist()


# --- sequences that begin alike ---------------------------------------------------------


@pytest.fixture
def pairs(tokenizer):
    """Two preference pairs, chosen rows first, right-padded: prompts of 20 and 9 tokens."""
    torch.manual_seed(2)
    prompts = [torch.randint(5, len(tokenizer), (n,)) for n in (20, 9)] * 2
    rows = [
        torch.cat([p, torch.randint(5, len(tokenizer), (n,))])
        for p, n in zip(prompts, (7, 12, 3, 25), strict=True)
    ]
    ids, mask, positions = torch.zeros(3, 4, 34, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
        positions[i, len(prompts[i]) - 1 : len(row) - 1] = 1
    positions = positions.bool()
    return {"input_ids": ids, "attention_mask": mask}, positions, ids.roll(-1, dims=1)[positions]


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        *((name, {}) for name in ("tied", "untied", "gpt2", "moe", "logits_scaling")),
        ("tied", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
        ("moe", {"sliding_window": 4}),
    ],
)
def test_a_common_prompt_runs_once(tokenizer, pairs, architecture, options):
    model = small_model(tokenizer, architecture, **options)
    model.set_attn_implementation("sdpa")
    mine, seen = widths(model, lambda: logps(ResponseReader(), model, pairs))
    tokens = int(pairs[0]["attention_mask"].sum()) - 20 - 9
    assert seen[-1] == (1, tokens)
    wanted = plain_logps(model, pairs)
    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(len(wanted))
    weight = model.get_input_embeddings().weight
    (gradient,) = torch.autograd.grad(mine, weight, upstream)
    (expected,) = torch.autograd.grad(wanted, weight, upstream)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_a_common_prompt_under_gradient_checkpointing(tokenizer, pairs):
    model = small_model(tokenizer)
    model.set_attn_implementation("sdpa")
    weight = model.get_input_embeddings().weight
    (expected,) = torch.autograd.grad(plain_logps(model, pairs).sum(), weight)
    model.train()
    model.gradient_checkpointing_enable()
    mine, seen = widths(model, lambda: logps(ResponseReader(), model, pairs))
    assert seen[-1] != (4, 34)
    (gradient,) = torch.autograd.grad(mine.sum(), weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_who_shares(tokenizer, pairs):
    model = small_model(tokenizer)
    model.set_attn_implementation("sdpa")
    assert sorted(plan_of(model, pairs[0])) == [PrefixGroup((0, 2), 20), PrefixGroup((1, 3), 9)]
    # a whole sequence may be the beginning of another
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0], [9, 9, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert sorted(prefix_groups(ids, mask.bool())) == [PrefixGroup((0, 1), 2), PrefixGroup((2,), 0)]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=6))
def test_no_other_groups_of_neighbours_save_more(rows):
    mask = torch.tensor([[i < len(row) for i in range(6)] for row in rows])
    ids = torch.tensor([row + [0] * (6 - len(row)) for row in rows])
    groups = prefix_groups(ids, mask)
    assert sorted(i for group in groups for i in group.members) == list(range(len(rows)))
    for members, shared in groups:
        assert len({tuple(rows[i][:shared]) for i in members}) == 1
        assert len(members) == 1 or all(len(rows[i]) >= shared for i in members)

    def most(left):
        """By trying all first groups of the sequences that are left, in the order of a dictionary.
        Of [0], [0, 0, 1], [0, 0, 1], [0, 1] it would save more to take the first with the last."""
        sizes = range(1, len(left) + 1)
        saved = ((size - 1) * alike(left[:size]) + most(left[size:]) for size in sizes)
        return max(saved, default=0)

    def alike(some):
        return len(list(itertools.takewhile(lambda c: len(set(c)) == 1, zip(*some, strict=False))))

    saved = sum((len(group.members) - 1) * group.shared for group in groups)
    assert saved == most(sorted(rows))


@pytest.mark.parametrize(
    ("architecture", "attention", "options"),
    [
        ("soft-capped", "eager", {}),
        ("tied", "eager", {}),
        ("moe", "sdpa", {"output_router_logits": True}),
    ],
)
def test_who_does_not_share(tokenizer, pairs, architecture, attention, options):
    model = small_model(tokenizer, architecture, **options)
    model.set_attn_implementation(attention)
    mine, seen = widths(model, lambda: logps(ResponseReader(), model, pairs))
    assert seen[-1][0] * seen[-1][1] >= int(pairs[0]["attention_mask"].sum())
    torch.testing.assert_close(mine, plain_logps(model, pairs), rtol=1e-5, atol=1e-5)


def test_a_loss_over_the_experts_counts_every_token_once(tokenizer, pairs):
    """Also where the reader has met the model without that loss, as in the reference pass."""
    model = small_model(tokenizer, "moe")
    model.set_attn_implementation("sdpa")
    inputs, positions, labels = pairs
    reader = ResponseReader()
    _, seen = widths(model, lambda: logps(reader, model, pairs))
    assert seen[-1][0] * seen[-1][1] < int(inputs["attention_mask"].sum()), "shared"
    wanted = model(**inputs, output_router_logits=True)
    inputs = inputs | {"output_router_logits": True}
    tokens, outputs = reader.token_statistics(model, positions, labels, **inputs)
    torch.testing.assert_close(outputs.aux_loss, wanted.aux_loss)
    torch.testing.assert_close(tokens.logps, plain_logps(model, pairs), rtol=1e-5, atol=1e-5)


def test_a_model_that_does_not_pass_the_tree_on_gets_none(tokenizer, pairs):
    class Deaf(type(small_model(tokenizer))):
        def forward(self, *args, bdpo_tree=None, **kwargs):
            return super().forward(*args, **kwargs)

    model = small_model(tokenizer)
    model.set_attn_implementation("sdpa")
    model.__class__ = Deaf
    mine, seen = widths(model, lambda: logps(ResponseReader(), model, pairs))
    assert seen[-1][0] * seen[-1][1] >= int(pairs[0]["attention_mask"].sum())
    torch.testing.assert_close(mine, plain_logps(model, pairs), rtol=1e-5, atol=1e-5)


def test_attention_that_takes_no_tree_may_be_chosen_later(tokenizer, pairs):
    model, reader = small_model(tokenizer), ResponseReader()
    model.set_attn_implementation("sdpa")
    logps(reader, model, pairs)
    model.set_attn_implementation("eager")
    mine = logps(reader, model, pairs)
    torch.testing.assert_close(mine, plain_logps(model, pairs), rtol=1e-5, atol=1e-5)
