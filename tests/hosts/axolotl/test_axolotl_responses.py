"""What is trained on is what the chat template writes for a response, whatever the response is."""

import random
import time

import pytest

pytest.importorskip("axolotl")

from axolotl.prompt_strategies.dpo import load
from axolotl.utils.chat_templates import get_chat_template
from axolotl.utils.data import rl
from axolotl.utils.dict import DictDefault
from datasets import Dataset

from bdpo_plugin.demo.tiny import build_tokenizer
from bdpo_plugin.hosts.axolotl.loading import wrap_loading
from bdpo_plugin.settings import BDPOError

#: Responses that are parts of templates, of Axolotl's own message, or written otherwise.
ANSWERS = (
    *("y", "n", "No", "me", "is", "end", "assistant", "user", "model", "A", "1", "t"),
    *("[[dummy_message]]", "message]]", "<|im_end|>", "<|im_end|>\n<|im_start|>assistant\ny"),
    *(" y", "y ", "y\n\n", "\ty\t", "a\r\nb", "é你好🎉", "{{ x }}", "[/INST]", "It is raining."),
    *("<think>\nwhy\n</think>\n\nIt is.", "<think>why</think>It is.", "</think>It is."),
)
SHORT = [{"role": "user", "content": "Is it raining?"}]
LONG = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "y"},
    {"role": "assistant", "content": "y"},
    {"role": "user", "content": "Is it raining?"},
]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.bos_token = "<|im_start|>"  # which some templates write
    return tokenizer


def made(rows, tokenizer, template, type="chat_template.default"):
    """What Axolotl makes of rows in a B-DPO run."""
    wrap_loading(rl)
    keys = {"bdpo": True, "dataset_num_proc": None, "datasets": [{"type": type}]}
    if template in ("chatml", "llama3") or "{" not in template:
        keys["chat_template"] = template
    else:
        keys |= {"chat_template": "jinja", "chat_template_jinja": template}
    strategy = load(type, cfg := DictDefault(keys), dataset_idx=0)
    function, more = strategy if isinstance(strategy, tuple) else (strategy, {})
    return rl._map_dataset(cfg, Dataset.from_list(rows), function, tokenizer, **more)


def row(answer, messages=SHORT, other="It is raining cats and dogs."):
    said = {"role": "assistant", "content": answer}
    return {
        "messages": messages,
        "chosen": said,
        "rejected": {"role": "assistant", "content": other},
    }


def check(rows, found, tokenizer, template):
    """The template's text of the conversation is that of what comes before, and the response."""
    for raw, ours in zip(rows, found, strict=True):

        def render(*more, raw=raw, **options):
            messages = [*raw["messages"], *more]
            template_text = get_chat_template(template, None, tokenizer)
            return tokenizer.apply_chat_template(
                messages, chat_template=template_text, tokenize=False, **options
            )

        assert ours["prompt"] == render(add_generation_prompt=True)
        whole = render(raw["chosen"])
        nowhere = "Zq7w5Vx3"
        before, _, after = render({"role": "assistant", "content": nowhere}).partition(nowhere)
        if not whole.startswith(before):  # the template takes the response apart
            before, after = ours["prompt"], ""
        if not whole.startswith(before):
            assert ours["chosen"].startswith(raw["chosen"]["content"])
            assert whole.rstrip().endswith(ours["chosen"])
            continue
        written = whole.removeprefix(before)
        end = after if written.endswith(after) else ""
        assert ours["chosen"] == written.removesuffix(end) + end.rstrip() or (
            not end and ours["chosen"] == written.rstrip()
        )


@pytest.mark.parametrize(
    "template",
    [
        "chatml",
        "llama3",
        "qwen3",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                *(
                    "alpaca",
                    "cohere",
                    "deepseek_v3",
                    "exaone4",
                    "gemma",
                    "gemma3",
                    "llama3_2_vision",
                ),
                *("mistral_v1", "mistral_v3_tekken", "phi_3", "phi_35", "qwen_25", "command_a"),
            )
        ),
    ],
)
def test_response_is_what_the_template_writes(template, tokenizer) -> None:
    rows = [row(answer, messages) for answer in ANSWERS for messages in (SHORT, LONG)]
    if template in ("gemma", "mistral_v1"):  # which have no system prompt
        rows = [row(answer) for answer in ANSWERS]
    if template == "qwen3":  # which tells no beginning of a response that it writes otherwise
        refused = [each for each in rows if each["chosen"]["content"].startswith("<think>why")]
        with pytest.raises(BDPOError, match="2 of 2 rows: Axolotl does not find the text of"):
            made(refused, tokenizer, template)
        rows = [each for each in rows if each not in refused]
    check(rows, made(rows, tokenizer, template), tokenizer, template)


@pytest.mark.parametrize("template", ["chatml", "gemma"])
def test_any_text(template, tokenizer) -> None:
    chance = random.Random(0)
    pieces = [*ANSWERS, *"yn[]_ \n", "<start_of_turn>", "model\n", "dummy", "<|im_start|>"]
    texts = {"".join(chance.choices(pieces, k=chance.randint(1, 4))) for _ in range(300)}
    rows = [row(text) for text in sorted(texts) if text.strip()]
    check(rows, made(rows, tokenizer, template), tokenizer, template)


def test_letters_of_axolotls_own_message(tokenizer, capsys) -> None:
    found = made([row("It is."), row("y"), row("It is.", other="me")], tokenizer, "chatml")
    assert found["chosen"] == ["It is.<|im_end|>", "y<|im_end|>", "It is.<|im_end|>"]
    assert found["rejected"][2] == "me<|im_end|>"
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "1 of 3 rows: Axolotl cuts `chosen` out of the chat template's text at a wrong" in told
    assert "1 of 3 rows: Axolotl cuts `rejected` out" in told


def test_an_empty_response_is_its_end_alone(tokenizer) -> None:
    found = made([row(""), row("  ")], tokenizer, "chatml")
    assert found["chosen"] == ["<|im_end|>", "  <|im_end|>"]
    with pytest.raises(BDPOError, match=r"1 of 1 rows: `chosen` is empty \(rows 0\)"):
        made([row("")], tokenizer, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}")


def test_reasoning_that_the_template_leaves_out(tokenizer, capsys) -> None:
    found = made([row("<think>why</think>It is.")], tokenizer, "deepseek_v3")
    assert found["chosen"][0].startswith("It is.")
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "the chat template writes another text than that of `chosen` (rows 0)" in told


def test_what_the_template_writes_before_a_response(tokenizer, capsys) -> None:
    found = made([row("It is.")], tokenizer, "qwen3")
    assert found["chosen"] == ["It is.<|im_end|>"]  # as in Axolotl's DPO
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert r"the chat template writes '</think>\n\n' before a response" in told
    behind = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    behind += "{% if add_generation_prompt %}<assistant><think>{% endif %}"
    found = made([row("It is.")], tokenizer, behind)
    assert (found["prompt"][0][-7:], found["chosen"]) == ("<think>", ["It is."])
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "the chat template ends a prompt with '<think>', and writes responses without" in told


def test_a_response_that_cannot_be_told(tokenizer) -> None:
    shout = "{{ messages[-1]['content'] | upper }}"
    with pytest.raises(BDPOError) as refusal:
        made([row("It is.")], tokenizer, shout)
    assert "1 of 1 rows: Axolotl does not find the text of `chosen` in" in str(refusal.value)


def test_a_template_that_ends_with_nothing_keeps_white_space(tokenizer) -> None:
    bare = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    bare += "{% if add_generation_prompt %}assistant: {% endif %}"
    found = made([row("It is.  "), row("user: ")], tokenizer, bare)
    assert found["chosen"] == ["It is.  ", "user: "]


def test_what_axolotl_does_not_hand_to_the_template(tokenizer) -> None:
    call = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
    with_call = {"role": "assistant", "content": "Look.", "tool_calls": call}
    rows = [row("It is."), {**row("It is."), "messages": [*SHORT, with_call, *SHORT]}]
    with pytest.raises(BDPOError) as refusal:
        made(rows, tokenizer, "qwen3")
    assert "1 of 2 rows: Axolotl does not hand `tool_calls` of `messages`" in str(refusal.value)
    assert "(rows 1)" in str(refusal.value)
    assert len(made(rows, tokenizer, "chatml")) == 2  # whose template reads none
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    with pytest.raises(BDPOError, match="does not hand `tools` to the chat template"):
        made([{**row("It is."), "tools": tools}], tokenizer, "qwen3")
    # what it says to do
    texts = [{"prompt": "Q: Is it? A: ", "chosen": "y", "rejected": "n"}]
    assert made(texts, tokenizer, "qwen3", "passthrough")["chosen"] == ["y"]


def test_ten_thousand_rows_take_no_more_than_seconds(tokenizer) -> None:
    """Of their iteration, and one text of the template for each form of a conversation."""
    rows = [row(f"It is raining on day {number}.") for number in range(2000)]
    function, _ = load("chat_template.default", DictDefault(datasets=[{}], chat_template="chatml"))
    begin = time.process_time()
    for each in rows:
        function(each, tokenizer=tokenizer)
    theirs = time.process_time() - begin
    begin = time.process_time()
    made(rows, tokenizer, "chatml")
    assert time.process_time() - begin < 3 * theirs + 2
