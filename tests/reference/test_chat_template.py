"""The null prompt under chat templates of every kind, and where the prompts are not all alike."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from bdpo_plugin.demo.tiny import build_tokenizer
from bdpo_plugin.demo.tiny.model import CHAT_TEMPLATE
from bdpo_plugin.reference.null_prompt import MIN_MATCH_RATE, find_null_prompt

DEFAULT = "You are a helpful assistant."
TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": TURNS,
    # a system block of its own, as Qwen2's; tools stand in it
    "default": (
        "{% set given = messages[0]['role'] == 'system' %}"
        "{{ '<|im_start|>system\n' + (messages[0]['content'] if given else '" + DEFAULT + "') }}"
        "{% if tools %}{{ '\n\n# Tools\n' + tools | tojson }}{% endif %}{{ '<|im_end|>\n' }}"
        "{% set messages = messages[1:] if given else messages %}" + TURNS
    ),
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
        "'<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    # the system message in the user's first turn, in marks of its own
    "llama 2": (
        "{% set given = messages[0]['role'] == 'system' %}"
        "{% for m in (messages[1:] if given else messages) %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' }}{% if given and loop.first %}"
        "{{ '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' }}{% endif %}"
        "{{ m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    # and without any
    "mistral": (
        "{% set given = messages[0]['role'] == 'system' %}{{ bos_token }}"
        "{% for m in (messages[1:] if given else messages) %}{% if m['role'] == 'user' %}"
        "{{ '[INST]' }}{% if given and loop.last %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
        "{{ m['content'] + '[/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    # no system role at all
    "gemma": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + "
        "('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] + "
        "'<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    # no header before the system message; the response begins with a thought
    "deepseek": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
        "{% elif m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{% else %}"
        "{{ '<|Assistant|>' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
    ),
    "qwen 3": (
        TURNS + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking"
        " %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    ),
    # no special token
    "vicuna": (
        "{% set given = messages[0]['role'] == 'system' %}"
        "{{ messages[0]['content'] if given else 'A chat of a user and an assistant.' }}"
        "{% for m in (messages[1:] if given else messages) %}{% if m['role'] == 'user' %}"
        "{{ ' USER: ' + m['content'] }}{% else %}{{ ' ASSISTANT: ' + m['content'] + eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
    ),
    "needs a system message": (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('where is the system?') }}"
        "{% endif %}" + TURNS
    ),
}
SPECIAL = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"]
SPECIAL += ["<end_of_turn>", "[INST]", "[/INST]", "<|User|>", "<|Assistant|>", "<think>"]
#: Those that write a system message as a turn of its own, or mark it.
OWN_SYSTEM = ["chatml", "default", "llama 3", "llama 2", "deepseek", "vicuna"]
QUERIES = ["How do I cook?", "Paint: a cow", "9 is odd.", "Where\n\nis it?", "Yes!", "assistant"]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = build_tokenizer(bos=True)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


def render(tokenizer, *contents, system=None, parts=False, **options):
    """A prompt whose turns alternate, the user's first and last."""
    turns = [("system", system)] if system is not None else []
    turns += [(["user", "assistant"][i % 2], text) for i, text in enumerate(contents)]
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
        for role, text in turns
    ]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, **options
    )


def find(tokenizer, texts):
    return find_null_prompt(
        tokenizer, [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    )


def scaffold(tokenizer, **options):
    return render(tokenizer, "@@", **options).replace("@@", "")


def squeezed(text):
    """Without spaces: one at the edge of a query is in a token with the query's first letters."""
    return text.replace(" ", "")


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_of_one_kind(tokenizer, name):
    tokenizer.chat_template = TEMPLATES[name]
    if name != "needs a system message":
        found = find(tokenizer, [render(tokenizer, q) for q in QUERIES])
        assert squeezed(found.text) == squeezed(scaffold(tokenizer))
        assert (found.source, found.match_rate, found.warnings) == ("chat template", 1.0, ())
    if name in [*OWN_SYSTEM, "needs a system message"]:
        found = find(tokenizer, [render(tokenizer, q, system="Be: brief.\n") for q in QUERIES])
        assert squeezed(found.text) == squeezed(scaffold(tokenizer, system="Be: brief.\n"))
        assert found.source == "chat template and what the prompts share"
        assert (found.match_rate, found.warnings) == (1.0, ())


@pytest.mark.parametrize("name", OWN_SYSTEM)
@pytest.mark.parametrize("without", [0, 2, 3])
def test_system_messages_that_differ_are_part_of_the_query(tokenizer, name, without):
    """The null prompt has the user's turn; what it has not is told."""
    tokenizer.chat_template = TEMPLATES[name]
    texts = [render(tokenizer, q) for q in QUERIES[:without]]
    texts += [render(tokenizer, q, system=f"Say {q} twice.") for q in QUERIES[without:]]
    found = find(tokenizer, texts)
    assert squeezed(found.text) == squeezed(scaffold(tokenizer))
    assert found.match_rate == pytest.approx(without / len(QUERIES))
    share = f"{1 - without / len(QUERIES):.1%} of the prompts"
    assert found.warnings[0].startswith(f"{share} begin or end otherwise than the null prompt")
    assert all("`bdpo_null_prompt`" in warning for warning in found.warnings)
    lacks = [w for w in found.warnings if w.startswith(f"{share} have a system message")]
    assert len(lacks) == (name in ("chatml", "llama 3", "llama 2"))


def test_system_messages_that_differ_where_each_prompt_needs_one(tokenizer):
    tokenizer.chat_template = TEMPLATES["needs a system message"]
    found = find(tokenizer, [render(tokenizer, q, system=f"Say {q}") for q in QUERIES])
    assert found.text == scaffold(tokenizer, system="")
    assert found.match_rate == 0
    assert "bdpo_null_prompt" in found.warnings[0]


def test_a_system_message_that_is_merged_into_the_users_turn(tokenizer):
    tokenizer.chat_template = TEMPLATES["mistral"]
    for systems in (["Be brief."] * len(QUERIES), QUERIES[::-1], [None, "Sing."] * 3):
        texts = [render(tokenizer, q, system=s) for q, s in zip(QUERIES, systems, strict=True)]
        found = find(tokenizer, texts)
        assert (found.text, found.match_rate) == ("<|bos|>[INST][/INST]", 1.0)


@pytest.mark.parametrize("name", TEMPLATES)
def test_earlier_turns(tokenizer, name):
    tokenizer.chat_template = TEMPLATES[name]
    system = "Be brief." if name == "needs a system message" else None
    texts = [render(tokenizer, q, f"Well, {q}", q[::-1], system=system) for q in QUERIES[:5]]
    texts += [render(tokenizer, QUERIES[5], system=system)]
    found = find(tokenizer, texts)
    assert squeezed(found.text) == squeezed(scaffold(tokenizer, system=system))
    assert (found.match_rate, found.warnings) == (1.0, ())


def test_tools_and_their_turns(tokenizer):
    """All prompts have the tools, some have used them."""
    tokenizer.chat_template = TEMPLATES["default"]
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    texts = [render(tokenizer, q, tools=tools) for q in QUERIES]
    found = find(tokenizer, texts)
    assert found.text == scaffold(tokenizer, tools=tools)
    assert (found.match_rate, found.warnings) == (1.0, ())
    end = "<|im_start|>assistant\n"
    texts[0] = texts[0].removesuffix(end) + f"{end}look_up()<|im_end|>\n<|im_start|>tool\n7"
    texts[0] += f"<|im_end|>\n{end}It is 7.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n{end}"
    found = find(tokenizer, texts)
    assert found.text == scaffold(tokenizer, tools=tools)
    [warning] = found.warnings
    assert warning.startswith("16.7% of the prompts have a tool message and the null prompt has no")


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_thought_that_the_template_writes(tokenizer, system):
    """Whether it does depends on an argument that is not known here: the prompts show it."""
    tokenizer.chat_template = TEMPLATES["qwen 3"]
    texts = [render(tokenizer, q, system=system, enable_thinking=False) for q in QUERIES]
    found = find(tokenizer, texts)
    assert found.text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert found.text == scaffold(tokenizer, system=system, enable_thinking=False)
    assert (found.match_rate, found.warnings) == (1.0, ())
    some = [render(tokenizer, q, enable_thinking=i % 2 == 0) for i, q in enumerate(QUERIES)]
    found = find(tokenizer, some)
    assert (found.text, found.match_rate) == (scaffold(tokenizer), 0.5)
    assert "bdpo_null_prompt" in found.warnings[0]


SYSTEMS = [None, "Be brief.", "user: no\n\nYes:", ""]


@settings(max_examples=40)
@given(
    name=st.sampled_from(["chatml", "default", "llama 3"]),
    kinds=st.lists(st.sampled_from(SYSTEMS), min_size=1, max_size=12),
    common=st.sampled_from(SYSTEMS),
    more=st.integers(0, 40),
)
def test_the_match_rate_is_the_share_of_the_prompts(tokenizer, name, kinds, common, more):
    """Counted from the messages: what 90 % of them have stays, else the template's own scaffold."""
    tokenizer.chat_template = TEMPLATES[name]
    kinds = kinds + [common] * more
    texts = [render(tokenizer, QUERIES[i % 6], system=s) for i, s in enumerate(kinds)]
    found = find(tokenizer, texts)
    system = max(kinds, key=kinds.count)
    system = system if kinds.count(system) >= MIN_MATCH_RATE * len(kinds) else None
    assert found.text == scaffold(tokenizer, system=system)
    assert found.match_rate == pytest.approx(kinds.count(system) / len(kinds))
    lacks_role = name != "default" and system is None and set(kinds) != {None}
    assert bool(found.warnings) == (found.match_rate < MIN_MATCH_RATE or lacks_role)


# --- templates that do not render ----------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('never') }}",
        "{{ messages[0]['text'] + '' }}",
        "{{ messages | nothing }}",
        "{% if %}",
        "a fixed text",
        {"rag": CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE},
    ],
    ids=[
        "raises",
        "another field",
        "unknown filter",
        "syntax",
        "ignores the messages",
        "no default",
    ],
)
def test_a_template_that_cannot_render(tokenizer, template):
    """The prompts may need none."""
    tokenizer.chat_template = template
    found = find(tokenizer, [f"Q: {q} A:" for q in QUERIES])
    assert found.text == "Q: A:"
    assert found.source == (
        "shared by all prompts, as the chat template cannot render a lone message of the user"
    )
    assert found.warnings == ()
    found = find(tokenizer, QUERIES)
    assert found.source.startswith("BOS token, as the chat template cannot render")
    assert "bdpo_null_prompt" in found.warnings[0]


@pytest.mark.parametrize("name", ["chatml", "llama 3", "gemma", "deepseek"])
def test_no_piece_of_a_header_is_used_unwarned(tokenizer, name):
    """Of prompts in turns whose template is not known."""
    tokenizer.chat_template = TEMPLATES["chatml" if name == "gemma" else name]
    texts = [render(tokenizer, q, system=[None, "Be brief."][i % 2]) for i, q in enumerate(QUERIES)]
    if name == "gemma":
        texts = [text.replace("<|im_start|>", "<start_of_turn>") for text in texts]
    tokenizer.chat_template = None
    found = find(tokenizer, texts)
    assert found.source in ("shared by all prompts", "BOS token")
    if name != "deepseek":
        assert found.warnings[0].startswith("what all prompts share is no whole turn of the user")
    assert "bdpo_null_prompt" in found.warnings[0]


def test_whole_turns_without_a_template(tokenizer):
    tokenizer.chat_template = TEMPLATES["llama 3"]
    texts = [render(tokenizer, q) for q in QUERIES]
    tokenizer.chat_template = None
    found = find(tokenizer, texts)
    assert (found.source, found.warnings) == ("shared by all prompts", ())


# --- the templates that the hosts ship -----------------------------------------------------


SHIPPED = [
    path
    for package, folder in (("trl", "chat_templates"), ("axolotl", "utils/chat_templates"))
    if (spec := find_spec(package))
    for path in sorted(Path(spec.origin).parent.joinpath(folder).rglob("*.jinja"))
]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_templates_of_the_hosts(tokenizer, path):
    """Some of them take a message as a list of parts alone."""
    tokenizer.chat_template = path.read_text()
    parts = len({render(tokenizer, q) for q in QUERIES}) == 1
    wanted = squeezed(scaffold(tokenizer, parts=parts))
    found = find(tokenizer, [render(tokenizer, q, parts=parts) for q in QUERIES])
    assert squeezed(found.text) == wanted
    assert (found.source, found.match_rate, found.warnings) == ("chat template", 1.0, ())
    try:
        systems = [[None, "Be: brief.\n"][q > "N"] for q in QUERIES]
        texts = [
            render(tokenizer, q, system=system, parts=parts)
            for q, system in zip(QUERIES, systems, strict=True)
        ]
    except TemplateError:  # no system role
        return
    found = find(tokenizer, texts)
    assert squeezed(found.text) == wanted
    assert found.match_rate == 1 or found.warnings
