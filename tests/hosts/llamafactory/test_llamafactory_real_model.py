"""LLaMA-Factory's own template for the real model, with what the recipe says beside it."""

from pathlib import Path

import pytest
import yaml

pytest.importorskip("llamafactory")

from llamafactory.data import get_template_and_fix_tokenizer
from llamafactory.hparams import DataArguments
from real_model import real_model
from transformers import AutoTokenizer

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parents[3] / "example_configs" / "llamafactory" / "smollm2-135m.yml"


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_recipes_template_is_the_models(system) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_model() / "model")
    talk = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Me.\n\n1. I"},
        {"role": "user", "content": "Why?"},
    ]
    told = [{"role": "system", "content": system}] * bool(system) + talk
    wanted = tokenizer.apply_chat_template(told, add_generation_prompt=True, return_dict=True)
    recipe = yaml.safe_load(RECIPE.read_text())
    keys = {key: recipe[key] for key in ("template", "default_system")}
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(**keys))
    answer = {"role": "assistant", "content": "Because."}
    prompt, response = template.encode_oneturn(tokenizer, [*talk, answer], system)
    assert prompt == wanted["input_ids"]
    assert tokenizer.decode(response) == "Because.<|im_end|>\n"
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
