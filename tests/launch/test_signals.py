"""Real signals, sent to this very process."""

from __future__ import annotations

import signal

import pytest

from tunefleet.launch.signals import stop_wishes

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that shows the last number of a list."""
    shown = [0.0]
    monkeypatch.setattr("tunefleet.launch.signals.time.monotonic", lambda: shown[-1])
    return shown


def test_without_a_signal_nothing_is_wished() -> None:
    with stop_wishes() as wish:
        assert wish.signal is None
        assert wish.exit_code == 0


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_the_first_signal_is_noted_and_the_block_goes_on(number: signal.Signals, code: int) -> None:
    reached = False
    with stop_wishes() as wish:
        signal.raise_signal(number)
        reached = True
    assert reached
    assert wish.signal is number
    assert wish.exit_code == code


@pytest.mark.parametrize(("second", "_code"), SIGNALS)
@pytest.mark.parametrize(("first", "code"), SIGNALS)
def test_the_second_signal_breaks_off(
    first: signal.Signals, code: int, second: signal.Signals, _code: int, clock: list[float]
) -> None:
    with stop_wishes() as wish:
        signal.raise_signal(first)
        clock.append(1.5)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)
    assert wish.exit_code == code, "the first one says how the run ends"


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_signals_that_come_together_are_one_wish(number: signal.Signals, code: int, clock: list[float]) -> None:
    with stop_wishes() as wish:
        signal.raise_signal(number)
        clock.append(0.9)
        signal.raise_signal(number)  # as `timeout` sends it, to the process and to its group
        clock.append(1.1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert wish.exit_code == code


def test_the_old_answers_to_signals_come_back() -> None:
    heard: list[int] = []

    def answer(number: int, _frame: object) -> None:
        heard.append(number)

    before = signal.signal(signal.SIGTERM, answer)
    try:
        interrupt = signal.getsignal(signal.SIGINT)
        with stop_wishes() as wish:
            signal.raise_signal(signal.SIGTERM)
            assert heard == []
        assert signal.getsignal(signal.SIGTERM) is answer
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) is interrupt
        assert wish.signal is signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_old_answers_come_back_after_an_error() -> None:
    before = [signal.getsignal(number) for number, _ in SIGNALS]
    with pytest.raises(ValueError, match="odd"), stop_wishes():
        raise ValueError("odd")
    assert [signal.getsignal(number) for number, _ in SIGNALS] == before
