"""Batches without their padding: when they are packed, and that nothing else changes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_model
from transformers import AutoModelForCausalLM, FalconConfig, Lfm2Config

from bdpo_plugin.model.packing import Apart, Plan, pack, plan_rows, units_of
from bdpo_plugin.model.reader import ResponseReader
from bdpo_plugin.model.traits import Traits, row_rules
from bdpo_plugin.model.tree import Unit
from bdpo_plugin.tiny import build_model


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


@pytest.mark.parametrize(
    ("architecture", "attention"),
    [
        *itertools.product(["tied", "gpt2", "moe"], ["sdpa", "eager"]),
        ("soft-capped", "eager"),  # which scaled_dot_product_attention cannot do
    ],
)
def test_the_rows_are_kept_apart(tokenizer, batch, architecture, attention):
    model = small_model(tokenizer, architecture)
    model.set_attn_implementation(attention)
    reader = ResponseReader()
    mine, seen = widths(model, lambda: logps(reader, model, batch))
    assert seen[-1] == (1, 45)
    torch.testing.assert_close(mine, plain_logps(model, batch), rtol=1e-5, atol=1e-5)


def test_sliding_windows(tokenizer, batch):
    model = small_model(tokenizer, "soft-capped", sliding_window=3)
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
    assert rules_of(model, batch[0])
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
    assert rules_of(model, inputs).tree
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
    lengths = (60, 5)
    few = {"max_position_embeddings": 64}
    assert members(small_model(tokenizer, "gpt2"), padded(*lengths)) == [[0, 1]]
    assert members(small_model(tokenizer, "gpt2", **few), padded(*lengths)) is None
    assert members(small_model(tokenizer, **few), padded(*lengths)) == [[0, 1]], "rotary"


def test_compiled_models_and_inputs_of_other_kinds_are_not_packed(tokenizer, batch):
    model = small_model(tokenizer)
    inputs = batch[0]
    assert rules_of(model, inputs)
    assert not rules_of(model, inputs | {"token_type_ids": inputs["input_ids"]})
    assert not rules_of(torch.compile(model), inputs)
    model.compile()
    assert not rules_of(model, inputs)


def plan_of(model, inputs, *, tree):
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    return plan_rows(rules_of(model, inputs), ids, mask, Apart(packed=True, shared=tree))


def members(model, inputs):
    """The sequences of each row of the cheapest plan without a tree."""
    plan = plan_of(model, inputs, tree=False)
    return plan and [[i for unit in row for i in unit.members] for row in plan.rows]


def padded(*lengths):
    width = max(lengths)
    rows = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    return {"input_ids": rows, "attention_mask": rows}


def test_packed_only_where_it_costs_less(tokenizer):
    model = small_model(tokenizer)  # hidden size 32: a token's own cost is that of 192 others
    model.set_attn_implementation("sdpa")
    assert members(model, padded(30, 6)) == [[0, 1]]
    assert members(model, padded(30, 30)) is None
    assert members(model, padded(30, 29, 29)) is None  # 88 tokens see more than 30
    assert members(model, padded(600, 10)) == [[0, 1]]
    assert members(model, padded(600, 300, 590, 310)) == [[0], [2], [1, 3]]
    assert len(members(model, padded(*[600] * 8, 10))) == 8
    model.config._attn_implementation = "flash_attention_2"
    assert members(model, padded(*[600] * 8, 10)) == [list(range(9))]
    assert members(model, padded(600, 600)) is None


def test_no_row_has_padding_where_a_loss_counts_it(tokenizer):
    model = small_model(tokenizer, "moe")
    model.set_attn_implementation("sdpa")
    batch = padded(60, 30, 25, 5)
    assert len(members(model, batch)) > 1
    model.config.output_router_logits = True
    assert members(model, batch) in (None, [[0, 1, 2, 3]])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_several_rows_with_gradient(tokenizer, attention):
    """Each position's state comes back to its place, and nothing passes between sequences."""
    model = small_model(tokenizer)
    model.set_attn_implementation(attention)
    torch.manual_seed(1)
    lengths = (20, 70, 33, 61, 12)
    batch = padded(*lengths)
    ids = torch.randint(5, len(tokenizer), batch["input_ids"].shape)
    positions = torch.zeros_like(ids, dtype=torch.bool)
    for row, length in enumerate(lengths):
        positions[row, length // 2 : length - 1] = True
    inputs = {"input_ids": ids, "attention_mask": batch["attention_mask"]}
    labels = ids.roll(-1, dims=1)[positions]
    weight = model.model.embed_tokens.weight
    rows = members(model, inputs) if attention == "eager" else [range(5)]
    assert attention == "sdpa" or 1 < len(rows) < len(lengths)
    mine, seen = widths(model, lambda: logps(ResponseReader(), model, (inputs, positions, labels)))
    assert seen[-1][0] == len(rows)
    wanted = plain_logps(model, (inputs, positions, labels))
    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(len(labels))
    (gradient,) = torch.autograd.grad(mine, weight, upstream)
    (expected,) = torch.autograd.grad(wanted, weight, upstream)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_pack(batch):
    inputs, positions, labels = batch
    mask = inputs["attention_mask"].bool()
    plan = Plan([[Unit((0,)), Unit((1,)), Unit((2,))]], tree=False)
    together, packed, order = pack(positions, inputs, mask, plan)
    assert packed["input_ids"].shape == packed["position_ids"].shape == together.shape == (1, 45)
    starts = (packed["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert starts == [0, 30, 39]
    assert order.tolist() == list(range(len(labels)))
    after = packed["input_ids"].roll(-1, dims=1)[together]
    assert after.tolist() == labels.tolist()

    plan = Plan([[Unit((1,)), Unit((2,))], [Unit((0,))]], tree=False)
    together, packed, order = pack(positions, inputs, mask, plan)
    assert packed["input_ids"].shape == packed["position_ids"].shape == together.shape == (2, 30)
    assert (packed["position_ids"][0, 15:] == 0).all()  # padding: nobody's neighbour
    after = packed["input_ids"].roll(-1, dims=1)[together]
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


@pytest.mark.parametrize("architecture", ["tied", "untied", "gpt2", "moe", "logits_scaling"])
def test_a_common_prompt_runs_once(tokenizer, pairs, architecture):
    model = small_model(tokenizer, architecture)
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
    (row,) = plan_of(model, pairs[0], tree=True).rows
    assert sorted(row) == [Unit((0, 2), 20), Unit((1, 3), 9)]
    # a whole sequence may be the beginning of another
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0], [9, 9, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert sorted(units_of(ids, mask.bool())) == [Unit((0, 1), 2), Unit((2,), 0)]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=6))
def test_no_other_units_save_more(rows):
    mask = torch.tensor([[i < len(row) for i in range(6)] for row in rows])
    ids = torch.tensor([row + [0] * (6 - len(row)) for row in rows])
    units = units_of(ids, mask)
    assert sorted(i for unit in units for i in unit.members) == list(range(len(rows)))
    for members, shared in units:
        assert len({tuple(rows[i][:shared]) for i in members}) == 1
        assert len(members) == 1 or all(len(rows[i]) >= shared for i in members)

    def most(left):
        """By trying all units of the first sequence that is left."""
        if not left:
            return 0
        return max(
            (len(unit) - 1) * alike([rows[i] for i in unit])
            + most([i for i in left if i not in unit])
            for size in range(len(left))
            for others in itertools.combinations(left[1:], size)
            for unit in [(left[0], *others)]
        )

    def alike(some):
        return len(list(itertools.takewhile(lambda c: len(set(c)) == 1, zip(*some, strict=False))))

    saved = sum((len(unit.members) - 1) * unit.shared for unit in units)
    assert saved == most(list(range(len(rows))))


@pytest.mark.parametrize(
    ("architecture", "attention", "options"),
    [
        ("soft-capped", "eager", {}),
        ("tied", "eager", {}),
        ("tied", "sdpa", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
        ("moe", "sdpa", {"sliding_window": 4}),
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
