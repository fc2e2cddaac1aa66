"""A real run against the independent float64 reimplementation in tests/truth.py."""

import pytest
import truth
from peft import PeftModel
from real_runs import as_function
from running import ABLATIONS, history, pairs, scores, sharp_model, trainer

COUNT = 8


def tokens(made):
    rows = made.train_dataset
    return rows["prompt_ids"], rows["chosen_ids"], rows["rejected_ids"]


@pytest.mark.parametrize("estimator", ["pointwise", "expected"])
@pytest.mark.parametrize(
    "settings",
    [
        {"bdpo_weighting": "softmax"},
        {"bdpo_weighting": "power", "bdpo_alpha": 0.7},
        {"bdpo_mi_normalize": False, "bdpo_alpha": 0.05},
        ABLATIONS["BW"],
        ABLATIONS["SF"],
    ],
    ids=["softmax", "power", "nats", "BW", "SF"],
)
def test_scores_weights_and_losses(tmp_path, tokenizer, estimator, settings):
    losses = {"loss_type": ["sigmoid", "ipo", "sft"], "loss_weights": [1.0, 0.01, 0.1]}
    # one batch is the whole dataset, so that its order does not matter
    made = trainer(
        output_dir=tmp_path,
        dataset=pairs(COUNT),
        per_device_train_batch_size=COUNT,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        learning_rate=3e-3,
        beta=0.3,
        bdpo_mi_estimator=estimator,
        **losses,
        **settings,
    )
    made.train()

    prompts, chosen, rejected = tokens(made)
    null = list(made.scorer.null_prompt.ids)
    assert null == tokenizer("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    reference = as_function(sharp_model(tokenizer))
    truths = [
        truth.score_pair(
            reference,
            x,
            null,
            y_w,
            y_l,
            estimator=estimator,
            normalize=settings.get("bdpo_mi_normalize", True),
        )
        for x, y_w, y_l in zip(prompts, chosen, rejected, strict=True)
    ]
    switches = {key.removeprefix("bdpo_"): v for key, v in settings.items() if "mi_" not in key}
    saved = scores(tmp_path)
    for row, (score, balance) in enumerate(
        (s, truth.balance_pair(s.mi_chosen, s.mi_rejected, **switches)) for s in truths
    ):
        for name, value in {**score._asdict(), **balance._asdict()}.items():
            assert saved[name][row] == pytest.approx(value, rel=2e-4, abs=2e-4), (name, row)

    logged = history(made, "loss")
    for step in (1, 2):  # at step 0 the policy is the reference
        policy = PeftModel.from_pretrained(sharp_model(tokenizer), tmp_path / f"checkpoint-{step}")
        expected = truth.batch_loss(
            as_function(policy),
            prompts,
            chosen,
            rejected,
            truths,
            beta=0.3,
            loss_types=losses["loss_type"],
            loss_weights=losses["loss_weights"],
            **switches,
        )
        assert logged[step] == pytest.approx(expected, rel=1e-4)
