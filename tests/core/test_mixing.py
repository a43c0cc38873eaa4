"""Classes with our methods in front: the same name, signature, pickle and copy as the class that they stand for."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref

from tokenreduce.core.mixing import assembled, mixed, parts


class Base:
    def __init__(self, number: int) -> None:
        self.number = number

    def answer(self, times: int = 1) -> int:
        return self.number * times


class Doubled:
    def answer(self, *args, **kwargs) -> int:
        return 2 * super().answer(*args, **kwargs)  # type: ignore[misc]


class Negative:
    def answer(self, *args, **kwargs) -> int:
        return -super().answer(*args, **kwargs)  # type: ignore[misc]


def test_methods_stand_in_front_and_say_the_stock_signature():
    kind = mixed(Base, Doubled)
    assert kind(3).answer(times=2) == 12
    assert mixed(Base, Doubled) is kind
    assert str(kind) == str(Base)
    assert kind.__name__ == "Base"
    assert inspect.signature(kind(3).answer) == inspect.signature(Base(3).answer)


def test_one_upon_the_other_copies_and_pickles():
    kind = assembled(Base, Doubled, Negative)
    assert parts(kind) == (Base, Doubled, Negative)
    one = kind(3)
    for made in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert type(made) is kind
        assert made.answer() == -6


def test_a_class_lives_as_long_as_what_it_stands_for():
    local = type("Local", (Base,), {})
    gone = weakref.ref(mixed(local, Doubled))
    del local
    gc.collect()
    assert gone() is None
