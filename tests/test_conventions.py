"""Seeds, colours, checks and the atomic writer."""

import errno
import itertools
import os
import random
import stat
import string
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from jumplora.conventions import (
    METHOD_COLORS,
    check_choice,
    check_name,
    figure_style,
    method_style,
    set_seed,
    write_atomic,
)

SAFE = string.ascii_letters + string.digits + " ._+-"


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1, np.int64(7)])
def test_one_seed_fixes_all_three_generators(seed):
    set_seed(seed)
    first, second = draw(), draw()
    set_seed(seed)
    assert draw() == first and all(a != b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "1", None])
def test_a_seed_outside_numpys_range_or_that_is_no_whole_number_is_refused(seed):
    with pytest.raises(ValueError, match=f"seed={seed!r} is outside 0 to 4294967295"):
        set_seed(seed)


# Machado et al. (2009), severity 1, on linear RGB
DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)
PROTANOPIA = np.array(
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
)


def linear(color):
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize(
    "sight", [np.eye(3), DEUTERANOPIA, PROTANOPIA], ids=["normal", "deuteranopia", "protanopia"]
)
def test_the_compared_methods_have_colours_that_stay_apart(sight):
    names = ["SeqLoRA", "IncLoRA", "ELLA", "IncLoRA + JumpLoRA", "ELLA + JumpLoRA"]
    seen = {name: lab(sight @ linear(METHOD_COLORS[name])) for name in names}
    for a, b in itertools.combinations(names, 2):
        assert np.linalg.norm(seen[a] - seen[b]) > 20, (a, b)


def test_colours_are_readable_on_white_and_gated_forms_are_darker_solid_and_filled():
    assert len(set(METHOD_COLORS.values())) == len(METHOD_COLORS)
    for method, color in METHOD_COLORS.items():
        assert 1.05 / (linear(color) @ [0.2126, 0.7152, 0.0722] + 0.05) >= 3, method
        gated = "JumpLoRA" in method
        look, base = method_style(method), method.removesuffix(" + JumpLoRA")
        assert (look["color"], look["linestyle"]) == (color, "-" if gated else "--")
        assert (
            look["fillstyle"] == ("left" if gated else "none")
            and look["marker"] == method_style(base)["marker"]
        )
        assert not gated or lab(linear(color))[0] < lab(linear(METHOD_COLORS[base]))[0] - 20, method
    late, published = method_style("ELLA + late gate"), method_style("ELLA + JumpLoRA")
    assert late == published | {"fillstyle": "full"}
    marks = {method_style(name)["marker"] for name in ("SeqLoRA", "IncLoRA", "ELLA", "O-LoRA")}
    assert len(marks) == 4 and method_style("a method of my own")["color"] not in METHOD_COLORS.values()


def test_the_figure_style_ends_with_its_block_even_after_an_error():
    before = dict(matplotlib.rcParams)
    with pytest.raises(RuntimeError), figure_style():
        assert not matplotlib.rcParams["axes.spines.top"] and dict(matplotlib.rcParams) != before
        raise RuntimeError
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("value", "allowed", "message"),
    [
        ("layers", ["model", "block", "layer"], "'model', 'block' or 'layer' (did you mean 'layer'?)"),
        ("INCLORA", ["ELLA", "IncLoRA"], "'ELLA' or 'IncLoRA' (did you mean 'IncLoRA'?)"),
        ("zebra", ["model", "block"], "'model' or 'block'"),
        (7, [1, 2], "1 or 2"),
        (7, [1], "1"),
    ],
)
def test_an_unknown_choice_names_what_was_given_what_is_allowed_and_the_nearest(value, allowed, message):
    assert check_choice(allowed[0], allowed, "setting") is allowed[0]
    with pytest.raises(ValueError) as caught:
        check_choice(value, allowed, "setting")
    assert str(caught.value) == f"setting={value!r} is not known; use {message}"


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../up", "a/b", "a\\b", "/root", ".hidden", "nul\0", "new\nline", "yelp\n", "x" * 81,
     "tab\t", " lead", "trail ", "trail.", "ü", "C:x", None, 3, b"yelp"],
)  # fmt: skip
def test_a_name_that_could_be_a_path_or_a_trap_is_refused(name):
    with pytest.raises(ValueError, match="task=.*cannot be part of a file name"):
        check_name(name, "task")


@given(st.text(max_size=90))
@example("IncLoRA + JumpLoRA")
@example("a.b_c-" + "x" * 74)
def test_a_name_passes_if_it_is_plain_and_stays_in_its_folder(name):
    plain = 1 <= len(name) <= 80 and set(name) <= set(SAFE) and not {name[0], name[-1]} & set(". ")
    try:
        assert check_name(name) == name
    except ValueError:
        assert not plain
        return
    assert plain and Path(os.path.normpath(Path("/results") / name)).parent == Path("/results")


def test_a_file_is_replaced_as_a_whole_and_has_the_usual_mode(tmp_path):
    path = tmp_path / "deep" / "er" / "file.json"
    assert write_atomic(path, "ä") == path and path.read_bytes() == "ä".encode()
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff" and list(path.parent.iterdir()) == [path]
    usual = tmp_path / "usual"
    usual.write_text("x")
    assert path.stat().st_mode == usual.stat().st_mode


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, fails):
    path = write_atomic(tmp_path / "file", "old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, fails, fail)
    with pytest.raises(OSError, match="no space left; what was there before is untouched") as caught:
        write_atomic(path, "new")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_file_and_folder_are_flushed_and_a_folder_that_cannot_be_is_no_error(tmp_path, monkeypatch):
    flushed = []

    def flush(number):
        flushed.append(stat.S_ISDIR(os.fstat(number).st_mode))
        if flushed[-1]:
            raise OSError("not here")

    monkeypatch.setattr(os, "fsync", flush)
    assert write_atomic(tmp_path / "file", "new").read_text() == "new" and flushed == [False, True]


def test_text_that_cannot_be_encoded_leaves_nothing(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "file", "\ud800")
    assert list(tmp_path.iterdir()) == []
