"""Method section 4, branch by branch."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import normalizers

from bdpo_plugin.demo.tiny import build_tokenizer, preference_pairs
from bdpo_plugin.demo.tiny.model import CHAT_TEMPLATE
from bdpo_plugin.reference.null_prompt import MIN_MATCH_RATE, find_null_prompt
from bdpo_plugin.settings import BDPOError

SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
)
# no special token at either end of the query, as Vicuna's
PLAIN = (
    "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
    "{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "bos": "{{ bos_token }}" + CHAT_TEMPLATE,
    "system": SYSTEM + CHAT_TEMPLATE,
    "plain": PLAIN,
}


def with_template(name, **options):
    tokenizer = build_tokenizer(bos=True, **options)
    tokenizer.chat_template = TEMPLATES.get(name)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers():
    return {name: with_template(name) for name in [*TEMPLATES, "none"]}


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def render(tokenizer, *contents):
    """The prompt of a conversation whose turns alternate, the user's first and last."""
    roles = ["user", "assistant"]
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return ids_of(
        tokenizer,
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False),
    )


QUERIES = [pair["messages"][0]["content"] for pair in preference_pairs(40)]


# --- the chat template ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("chatml", "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"),
        ("bos", "<|bos|><|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"),
        (
            "system",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_the_template_without_its_query(tokenizers, name, wanted):
    tokenizer = tokenizers[name]
    found = find_null_prompt(tokenizer, [render(tokenizer, q) for q in QUERIES])
    assert found.text == wanted
    assert found.text == tokenizer.decode(found.ids)
    assert (found.source, found.match_rate, found.warnings) == ("chat template", 1.0, ())


def test_a_template_without_special_tokens(tokenizers):
    """Where a word of the query merges with the template's space, the data may decide."""
    tokenizer = tokenizers["plain"]
    found = find_null_prompt(tokenizer, [render(tokenizer, q) for q in QUERIES])
    assert found.text == "USER: ASSISTANT:"
    assert found.match_rate == 1.0


def test_it_does_not_depend_on_the_queries(tokenizers):
    """Even where all of them begin and end in the same words."""
    tokenizer = tokenizers["chatml"]
    queries = [f"How do I {word} tonight?" for word in ("cook", "sing", "paint")]
    similar = find_null_prompt(tokenizer, [render(tokenizer, q) for q in queries])
    assert similar.ids == find_null_prompt(tokenizer, [render(tokenizer, QUERIES[0])]).ids


def test_one_prompt_and_identical_prompts(tokenizers):
    tokenizer = tokenizers["chatml"]
    prompt = render(tokenizer, QUERIES[0])
    for prompts in ([prompt], [prompt] * 5):
        found = find_null_prompt(tokenizer, prompts)
        assert found.source == "chat template"
        assert len(found.ids) < len(prompt)


@pytest.mark.parametrize("name", ["chatml", "bos", "system"])
def test_many_turns_match(tokenizers, name):
    tokenizer = tokenizers[name]
    prompts = [
        render(tokenizer, QUERIES[i], "All right.", QUERIES[i + 1])
        if i % 2
        else render(tokenizer, QUERIES[i])
        for i in range(20)
    ]
    found = find_null_prompt(tokenizer, prompts)
    assert (found.source, found.match_rate) == ("chat template", 1.0)


def test_a_few_prompts_in_another_format(tokenizers):
    tokenizer = tokenizers["chatml"]
    prompts = [render(tokenizer, q) for q in QUERIES]
    odd = [ids_of(tokenizer, f"Q: {q}\nA:") for q in QUERIES]
    few, half = round(len(prompts) * (1 - MIN_MATCH_RATE)), len(prompts) // 2
    scaffold = find_null_prompt(tokenizer, prompts).ids
    for number, warned in ((few, False), (few + 1, True), (half, True)):
        found = find_null_prompt(tokenizer, odd[:number] + prompts[number:])
        assert (found.ids, found.source) == (scaffold, "chat template")
        assert found.match_rate == pytest.approx(1 - number / len(prompts))
        assert [w.split()[0] for w in found.warnings] == [f"{number / len(prompts):.1%}"] * warned
    found = find_null_prompt(tokenizer, odd[: half + 1] + prompts[half + 1 :])
    assert_bos(found, "<|bos|>")


@given(queries=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=4))
@example(queries=["?"])
@example(queries=["\n\n", " ", "assistant\n"])
@example(queries=["user", "<|im_end|>"])
@pytest.mark.parametrize("name", ["chatml", "bos", "system"])
def test_no_token_of_a_query_is_in_it(tokenizers, name, queries):
    """Special tokens bound the query, so its tokens are those between front and back: whatever
    the queries are, the null prompt is the template's own."""
    tokenizer = tokenizers[name]
    found = find_null_prompt(tokenizer, [render(tokenizer, q) for q in queries])
    known = find_null_prompt(tokenizer, [render(tokenizer, q) for q in QUERIES])
    assert found.ids == known.ids


# --- the prompts of the data ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["chatml", "none"])
def test_prompts_in_another_format_than_the_template(tokenizers, name):
    tokenizer = tokenizers[name]
    prompts = [ids_of(tokenizer, f"### Question:\n{q}\n\n### Answer:\n") for q in QUERIES]
    found = find_null_prompt(tokenizer, prompts)
    assert (found.source, found.match_rate) == ("shared by all prompts", None)
    assert found.warnings == ()
    assert found.text.startswith("### Question:\n")
    assert found.text.endswith("### Answer:\n")
    assert QUERIES[0][:8] not in found.text


@pytest.mark.parametrize(("before", "after"), [("### Question:\n", ""), ("", "\n### Answer:\n")])
def test_only_a_front_or_only_a_back(tokenizers, before, after):
    tokenizer = tokenizers["none"]
    texts = ("7 apples.", "Who was it?", "no")
    prompts = [ids_of(tokenizer, f"{before}{text}{after}") for text in texts]
    found = find_null_prompt(tokenizer, prompts)
    assert found.source == "shared by all prompts"
    assert found.text.strip() == (before + after).strip()


# --- the fallback --------------------------------------------------------------------------


def assert_bos(found, token):
    assert (found.text, found.source, found.match_rate) == (token, "BOS token", None)
    [warning] = found.warnings
    assert token in warning
    assert "bdpo_null_prompt" in warning


def test_nothing_in_common(tokenizers):
    tokenizer = tokenizers["none"]
    found = find_null_prompt(tokenizer, [ids_of(tokenizer, q) for q in ("Who was it?", "7 apples")])
    assert_bos(found, "<|bos|>")


def test_nothing_in_common_but_bos(tokenizers):
    """A shared BOS is no scaffold: it is the bare BOS that distorts the ranking."""
    tokenizer = tokenizers["none"]
    prompts = [tokenizer(q)["input_ids"] for q in ("Who was it?", "7 apples")]
    assert {p[0] for p in prompts} == {tokenizer.bos_token_id}
    assert_bos(find_null_prompt(tokenizer, prompts), "<|bos|>")
    doubled = [[tokenizer.bos_token_id, *p] for p in prompts]
    assert_bos(find_null_prompt(tokenizer, doubled), "<|bos|>")


def test_eos_where_there_is_no_bos():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    assert tokenizer.bos_token_id is None
    prompts = [ids_of(tokenizer, q) for q in ("Who was it?", "7 apples")]
    assert_bos(find_null_prompt(tokenizer, prompts), "<|im_end|>")


def test_neither_bos_nor_eos():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = tokenizer.eos_token = None
    prompts = [ids_of(tokenizer, q) for q in ("Who was it?", "7 apples")]
    with pytest.raises(BDPOError, match=r"neither a BOS nor an EOS.*bdpo_null_prompt"):
        find_null_prompt(tokenizer, prompts)


A, B, C, D = 10, 11, 12, 13


@pytest.mark.parametrize(
    "prompts",
    [
        [[A, B, C]],
        [[A, B, C]] * 3,
        [[A, B], [A, B, C]],
        [[A, B], [C, A, B]],
        [[A], [A, B, A]],
        [[A, A], [A, A, A]],
        [[A, B, A], [A, B, C, B, A], [A, B, A]],
        [[A, B], [A, C, B], [A, D, B]],
        [],
    ],
    ids=str,
)
def test_it_is_never_a_whole_prompt(tokenizers, prompts):
    """A null prompt equal to a prompt would give that row a mutual information of 0."""
    found = find_null_prompt(tokenizers["none"], prompts)
    assert list(found.ids) not in prompts
    assert_bos(found, "<|bos|>")


@given(
    prompts=st.lists(st.lists(st.integers(10, 12), min_size=1, max_size=6), min_size=1, max_size=4)
)
def test_front_and_back_never_overlap(tokenizers, prompts):
    found = find_null_prompt(tokenizers["none"], prompts)
    assert list(found.ids) not in prompts
    if found.source == "shared by all prompts":
        assert len(found.ids) < min(map(len, prompts))
        cuts = range(len(found.ids) + 1)
        assert any(
            all(
                tuple(p[:cut]) + tuple(p[len(p) - len(found.ids) + cut :]) == found.ids
                for p in prompts
            )
            for cut in cuts
        )


def test_a_prompt_as_short_as_the_scaffold(tokenizers):
    """Truncated prompts may be shorter than the template around them."""
    tokenizer = tokenizers["chatml"]
    scaffold = find_null_prompt(tokenizer, [render(tokenizer, QUERIES[0])]).ids
    front, back = list(scaffold[:2]), list(scaffold[2:])
    prompts = [render(tokenizer, q) for q in QUERIES]
    for short in (list(scaffold), back, front, back[-1:]):
        found = find_null_prompt(tokenizer, [*prompts, short])
        assert found.ids == scaffold
        assert found.match_rate == pytest.approx(40 / 41)


def test_prompts_cut_at_their_front(tokenizers):
    """`truncation_mode: keep_end` takes the front of the scaffold away; the back is shared."""
    tokenizer = tokenizers["chatml"]
    queries = ("Who was it?", "We have 7 blue apples", "Please explain!")
    prompts = [render(tokenizer, q)[-9:] for q in queries]
    found = find_null_prompt(tokenizer, prompts)
    assert found.source == "shared by all prompts"
    assert found.text == "<|im_end|>\n<|im_start|>assistant\n"
    [warning] = found.warnings
    assert warning.startswith("what all prompts share is no whole turn of the user")
    assert "bdpo_null_prompt" in warning


# --- the override --------------------------------------------------------------------------


def test_the_override_wins(tokenizers):
    tokenizer = tokenizers["bos"]
    prompts = [render(tokenizer, q) for q in QUERIES]
    text = "<|im_start|>user\nplease ask me something<|im_end|>\n"
    found = find_null_prompt(tokenizer, prompts, text)
    assert list(found.ids) == ids_of(tokenizer, text)
    assert tokenizer.bos_token_id not in found.ids
    assert (found.text, found.source) == (text, "bdpo_null_prompt")
    assert found.warnings == ()


def test_an_override_without_tokens():
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(BDPOError, match=r"bdpo_null_prompt: '  '.*no token"):
        find_null_prompt(tokenizer, [], "  ")
