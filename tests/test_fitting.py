"""Whether it fits, and advice that must hold when it is followed."""

import re

import pytest

from cvlib import recipes
from cvlib.fitting import fits, serves
from cvlib.memory import CONTEXT, of_recipe
from cvlib.shapes import SHAPES, shape_of


@pytest.mark.parametrize("gigabytes", [7, 11.5, 15.8, 24])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("base", ["llama-7b", "llama-13b", "Qwen/Qwen2.5-7B-Instruct"])
def test_following_the_advice_makes_it_fit(base, bits, gigabytes):
    settings = [f"bits={bits}", "data.max_length=1024", "schedule.batch_rows=128", "schedule.micro_rows=8"]
    recipe = recipes.load("smollm2-cpu", settings)
    yes, line = fits(recipe, SHAPES[base], gigabytes * 1e9)
    assert "\n" not in line
    assert not yes  # eight rows of 1,024 tokens fit none of these cards
    if changes := re.findall(r"--set (\S+)", line):
        assert fits(recipes.load("smollm2-cpu", settings + changes), SHAPES[base], gigabytes * 1e9)[0]
    else:
        assert "smaller base" in line
        assert gigabytes < 11.5


def test_what_fits_says_how_much_it_needs():
    recipe = recipes.load("smollm2-cpu")
    yes, line = fits(recipe, SHAPES["smollm2-135m"], 8e9, "cpu", "bfloat16")
    needed = of_recipe(recipe, SHAPES["smollm2-135m"], "cpu", "bfloat16").peak
    assert yes
    assert line == f"needs {needed / 1e9:.1f} of 8.0 GB"
    assert not fits(recipe, SHAPES["smollm2-135m"], needed, "cpu", "bfloat16")[0]  # a margin is kept
    assert needed > CONTEXT["cpu"]


@pytest.mark.parametrize("gigabytes", [4, 6, 11, 24])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_following_the_advice_makes_the_answer_fit(bits, gigabytes):
    recipe = recipes.load("smollm2-cpu", [f"bits={bits}", "base=llama-7b"])
    yes, line = serves(recipe, SHAPES["llama-7b"], 8192, gigabytes * 1e9)
    assert yes == (gigabytes >= {16: 24, 8: 24, 4: 11}[bits])
    if changes := re.findall(r"--(set \S+|serve \d+)", line):
        named = dict(change.split(" ") for change in changes)
        smaller = recipes.load("smollm2-cpu", ["base=llama-7b", named["set"]])
        assert serves(smaller, SHAPES["llama-7b"], int(named.get("serve", 8192)), gigabytes * 1e9)[0]
    else:
        assert yes or (gigabytes == 4 and "smaller base" in line)


def test_the_command_counts_an_answer_as_well(run, refused):
    same = ("memory", "smollm2-cpu", "--set", "base=llama-7b", "--set", "bits=4", "--card", "6")
    code, out, _ = run(*same, "--serve", "1024")
    assert code == 0
    assert "KV cache" in out
    assert "needs 5.1 of 6.0 GB" in out
    code, out, _ = run(*same, "--serve", "32768")
    assert code == 1
    assert "--serve" in out.splitlines()[-1]
    refused([*same, "--serve", "0"], "'0' is not a whole number from 1")


@pytest.mark.parametrize("name", [name for name in recipes.names() if name.endswith(("2080ti", "t4", "8bit"))])
def test_a_recipe_fits_the_card_it_is_named_after(name):
    recipe = recipes.load(name)
    card = 16e9 if name.endswith("t4") else 11e9
    assert fits(recipe, shape_of(recipe.base), card)[0]


def test_what_is_not_counted_is_said():
    recipe = recipes.load("chinese-llama-7b-pretrain")
    assert fits(recipe, shape_of(recipe.base), 16e9)[1].endswith("; the rows of growth.tokenizer are not counted")
