"""tau_theta: classes as tokens, conditions that training drops, names that nobody knows."""

from typing import Any

import pytest
import torch

from minildm import ConditionerConfig, Conditioning
from minildm.conditioning import ClassConditioner, Unconditional, build_conditioner

CLASSES = ("ant", "bee", "bumblebee")


def classes(p_uncond: float = 0.1) -> ClassConditioner:
    config = ConditionerConfig(kind="class", classes=CLASSES, d_cond=5, p_uncond=p_uncond)
    return build_conditioner(config)


def test_the_config_names_the_kind() -> None:
    assert isinstance(classes(), ClassConditioner)
    assert isinstance(build_conditioner(ConditionerConfig()), Unconditional)


def test_each_class_has_a_token_of_its_own() -> None:
    tau = classes().eval()
    c = tau({"label": torch.tensor([2, 0, 2])})
    assert c.concat is None
    assert c.tokens.shape == (3, 1, 5)
    assert torch.equal(c.tokens[0], c.tokens[2])
    assert not torch.equal(c.tokens[0], c.tokens[1])
    assert c.tokens.requires_grad  # tau_theta is trained with the UNet


def test_the_null_is_no_class(randn: Any) -> None:
    tau = classes().eval()
    null, every = tau.null(2).tokens, tau({"label": torch.arange(3)}).tokens
    assert null.shape == (2, 1, 5)
    assert all(not torch.equal(null[0], token) for token in every)


def test_a_dropped_condition_is_the_null() -> None:
    tau, n, p = classes(p_uncond=0.3).train(), 4000, 0.3
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        tokens = tau({"label": torch.ones(n, dtype=torch.long)}).tokens
    is_null = (tokens == tau.null(1).tokens).all(dim=(1, 2))
    is_bee = (tokens == tau.eval()({"label": torch.tensor([1])}).tokens).all(dim=(1, 2))
    assert (is_null ^ is_bee).all()
    assert abs(is_null.float().mean().item() - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_nothing_is_dropped_in_evaluation_or_at_rate_zero() -> None:
    label = torch.arange(300) % 3
    for tau in (classes(0.9).eval(), classes(0.0).train()):
        state = torch.get_rng_state()
        tokens = tau({"label": label}).tokens[:, 0]
        assert torch.equal(tokens, tau.embedding.weight[label])
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("label", [3, -1, 100])
def test_a_label_out_of_range_is_refused(label: int) -> None:
    with pytest.raises(ValueError, match=rf"label must lie in 0\.\.2, got .*{label}"):
        classes()({"label": torch.tensor([1, label])})


@pytest.mark.parametrize(
    ("y", "labels"),
    [
        ("bee", [1]),
        (2, [2]),
        (["bee", "ant", "bee"], [1, 0, 1]),
        (("ant", 2), [0, 2]),
        (torch.tensor([0, 1], dtype=torch.int32), [0, 1]),
    ],
)
def test_names_and_labels_are_understood(y: object, labels: list[int]) -> None:
    label = classes().batch_from(y, len(labels))["label"]
    assert label.tolist() == labels
    assert label.dtype == torch.int64


def test_an_unknown_class_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match="class='bumble' is not known; did you mean 'bumblebee'"):
        classes().batch_from(["ant", "bumble"], 2)


def test_an_unknown_class_like_no_other_is_refused_with_all_names() -> None:
    with pytest.raises(ValueError, match=r"class='xyz' is not known\. Known: ant, bee, bum"):
        classes().batch_from("xyz", 1)


def test_a_class_model_must_be_told_what_to_make() -> None:
    with pytest.raises(ValueError, match="y is None"):
        classes().batch_from(None, 1)


def test_an_unconditional_model_takes_nothing() -> None:
    tau = build_conditioner(ConditionerConfig())
    assert tau({"label": torch.tensor([1])}) == tau.null(3) == Conditioning(None, None)
    assert tau.batch_from(None, 3) == {}
    assert not list(tau.parameters())
    with pytest.raises(ValueError, match="y='cat': this model is unconditional"):
        tau.batch_from("cat", 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "speech"}, "kind='speech' is not known"),
        ({"kind": "class", "classes": ("ant", "ant")}, "different names"),
        ({"p_uncond": 1.0}, "p_uncond=1.0"),
        ({"p_uncond": -0.1}, "p_uncond=-0.1"),
        ({"kind": "class", "null_class": False}, "p_uncond=0.1 must be 0 with null_class=False"),
        ({"kind": "ids", "vocab_size": 5}, "p_uncond=0.1 must be 0 without a null_id"),
        ({"kind": "ids", "vocab_size": 5, "null_id": 5}, r"null_id=5 must lie in 0\.\.4"),
    ],
)
def test_impossible_configs_are_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ConditionerConfig(**options)


def test_classes_may_have_no_null() -> None:
    config = ConditionerConfig(
        kind="class", classes=CLASSES, d_cond=5, p_uncond=0.0, null_class=False
    )
    tau = build_conditioner(config).train()
    assert tau.embedding.weight.shape == (3, 5)
    assert torch.equal(tau({"label": torch.arange(3)}).tokens[:, 0], tau.embedding.weight)
    with pytest.raises(ValueError, match=r"null_class=False: .*guidance_scale must be 1"):
        tau.null(1)


def test_a_class_conditioner_without_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one name"):
        build_conditioner(ConditionerConfig(kind="class"))
