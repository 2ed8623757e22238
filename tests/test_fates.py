"""Fates: what becomes of pruned tokens."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest

import simba
from simba.fates import Drop, Fate, Skip, Write
from simba.fates.registry import FATES


@pytest.fixture
def elsewhere(monkeypatch):
    """A fate that is not simba's own."""

    @dataclasses.dataclass(frozen=True)
    class Elsewhere(Fate):
        name: ClassVar[str] = "elsewhere"
        in_sequence: ClassVar[bool] = True
        may_return: ClassVar[bool] = False

    return Elsewhere


def test_names():
    assert simba.fates.names() == ["drop", "skip", "write"]
    assert simba.SimbaConfig().fate == Drop() == FATES.make("drop")
    assert simba.SimbaConfig(fate="write").fate == Write() != simba.SimbaConfig(fate="skip").fate
    assert not Drop.in_sequence and not Drop.may_return
    assert Write.in_sequence and not Write.may_return
    assert Skip.in_sequence and Skip.may_return


def test_others_are_refused(elsewhere):
    """The layers would not do what they say."""
    for fate in (elsewhere(), elsewhere, Drop, "elsewhere", "wirte"):
        with pytest.raises(simba.ConfigError, match=r"unknown fate .*known: drop, skip, write"):
            simba.SimbaConfig(fate=fate)


def test_only_another_fate_than_drop_is_worth_a_word(model, elsewhere, monkeypatch):
    simba.sparsify(model, 0.5, fate="drop")
    summary = simba.summary(model, 100)
    assert "criterion=influence\n" in str(summary)
    elsewhere.__module__ = "simba.fates.elsewhere"
    monkeypatch.setitem(FATES._kinds, "elsewhere", elsewhere)
    config = simba.SimbaConfig(0.5, fate="elsewhere")
    status = dataclasses.replace(summary.status, config=config)
    changed = dataclasses.replace(summary, status=status)
    assert "criterion=influence, fate=elsewhere\n" in str(changed)
    assert simba.SimbaConfig.from_dict(config.to_dict()) == config
