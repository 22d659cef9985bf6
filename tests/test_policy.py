"""Policies: their text, rounding and arithmetic, and the values that they refuse."""

from __future__ import annotations

import copy
import dataclasses
import enum
import math
import pickle
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import kaio
from kaio import AUTO, KaioError, Keepalive, PolicyError, SocketState, Step
from kaio.policy import MAX_COUNT, MAX_SECONDS, MAX_USER_TIMEOUT_MS, Auto, KeepaliveArg, Stalled, as_policy

MAX_USER_TIMEOUT = MAX_USER_TIMEOUT_MS / 1000
STALLED: tuple[Stalled, ...] = ("keep", "drop")

seconds = st.integers(1, MAX_SECONDS) | st.floats(0, MAX_SECONDS, exclude_min=True, allow_subnormal=False)
counts = st.integers(1, MAX_COUNT)
user_timeouts = st.floats(0, MAX_USER_TIMEOUT, exclude_min=True, allow_subnormal=False)


@st.composite
def made_policies(draw: st.DrawFn) -> Keepalive:
    """Any policy that the constructor accepts."""
    idle, interval, count = draw(st.none() | seconds), draw(st.none() | seconds), draw(st.none() | counts)
    stalled: Stalled = draw(st.sampled_from(STALLED))
    least = 0.001
    longest = 0.0
    if idle is not None and interval is not None:
        if count != 1:
            least = math.ceil(idle) + 2 * math.ceil(interval)
        longest = math.ceil(idle) + math.ceil(interval) * (count or 0)
    user_timeout = draw(st.sampled_from([AUTO, None]) | st.floats(least, MAX_USER_TIMEOUT))
    if user_timeout is AUTO and stalled == "drop" and longest > MAX_USER_TIMEOUT:
        user_timeout = None
    return Keepalive(idle, interval, count, user_timeout=user_timeout, stalled=stalled)


policies = st.sampled_from([Keepalive.OFF, Keepalive.SYSTEM, Keepalive()]) | made_policies()


Maker = Callable[..., Keepalive]
make_policy: Maker = Keepalive  # without the types of its parameters, which these tests violate

# -- text


@given(policies)
@example(Keepalive(None, None, None))
@example(Keepalive(8, 8, 1, user_timeout=8.41))
@example(Keepalive(None, None, None, user_timeout=None, stalled="drop"))
@example(Keepalive(user_timeout=MAX_USER_TIMEOUT))
def test_text_of_a_policy_parses_to_the_same_policy(policy: Keepalive) -> None:
    """str and parse are inverse, for every valid policy."""
    assert Keepalive.parse(str(policy)) == policy


@given(policies)
def test_repr_of_a_policy_evaluates_to_the_same_policy(policy: Keepalive) -> None:
    """The repr is an expression whose value is an equal policy."""
    assert eval(repr(policy), {"Keepalive": Keepalive, "AUTO": AUTO}) == policy


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (Keepalive(), "20s:10s:4"),
        (Keepalive.OFF, "off"),
        (Keepalive.SYSTEM, "on"),
        (Keepalive(1800, None, 10), "1800s::10"),
        (Keepalive(None, None, None), "::"),
        (Keepalive(user_timeout=None), "20s:10s:4,user_timeout=none"),
        (
            Keepalive(8, 8, 1, user_timeout=8.41, stalled="drop"),
            "8s:8s:1,user_timeout=8410ms,stalled=drop",
        ),
    ],
    ids=str,
)
def test_policies_have_a_short_text(policy: Keepalive, text: str) -> None:
    """nginx's form, followed only by the fields that differ from their defaults."""
    assert str(policy) == text


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        # nginx's
        ("on", Keepalive.SYSTEM),
        ("off", Keepalive.OFF),
        ("  OFF\n", Keepalive.OFF),
        ("20s:10s:4", Keepalive()),
        ("20:10:4", Keepalive()),
        ("30m::10", Keepalive(1800, None, 10)),
        ("::", Keepalive(None, None, None)),
        ("::3", Keepalive(None, None, 3)),
        (":5s:", Keepalive(None, 5, None)),
        (" 20s : 10s : 4 ", Keepalive()),
        # names; what is not named has its default
        ("idle=30s", Keepalive(30)),
        ("interval=5s", Keepalive(interval=5)),
        ("count=3", Keepalive(count=3)),
        ("IDLE=30S, Count=3", Keepalive(30, count=3)),
        ("idle=20s,count=4,user_timeout=1m", Keepalive(user_timeout=60)),
        ("user_timeout=auto", Keepalive()),
        ("user_timeout=none", Keepalive(user_timeout=None)),
        ("stalled=drop", Keepalive(stalled="drop")),
        ("stalled=keep", Keepalive()),
        # detect and hold
        ("detect=30s", Keepalive.detect(within=30)),
        ("detect=1m", Keepalive()),
        ("hold=350s", Keepalive.hold(against=350)),
        ("hold=5.5m", Keepalive.hold(against=330)),
        # units
        ("1h:1m:1", Keepalive(3600, 60, 1)),
        ("0.1d:1s:1", Keepalive(8640, 1, 1)),
        ("1m30s:10s:4", Keepalive(90)),
        ("1h 1m 1s:10s:4", Keepalive(3661)),
        ("1.5m:10s:4", Keepalive(90)),
        ("500ms:1ms:4", Keepalive(1, 1, 4)),
        ("1s1ms:10s:4", Keepalive(2)),
        ("idle=8s,interval=8s,count=1,user_timeout=8s410ms", Keepalive(8, 8, 1, user_timeout=8.41)),
        ("20.000s:0010s:4", Keepalive()),
    ],
)
def test_parse_accepts_every_form(text: str, policy: Keepalive) -> None:
    """nginx's form, named fields, detect= and hold=, and times with units."""
    assert Keepalive.parse(text) == policy


# -- rounding


@pytest.mark.parametrize(
    ("given_seconds", "kernel"),
    [(1, 1), (20.0, 20), (0.1, 1), (1e-300, 1), (20.0001, 21), (1.5, 2), (32766.1, 32767), (32767.0, 32767)],
)
def test_times_are_rounded_up_to_whole_seconds(given_seconds: float, kernel: int) -> None:
    """Never down: the kernel counts in whole seconds."""
    policy = Keepalive(given_seconds, given_seconds, 1)
    assert (policy.idle, policy.interval) == (kernel, kernel)


@pytest.mark.parametrize(
    ("given_seconds", "milliseconds"),
    [
        (60, 60_000),
        (8.41, 8410),  # 8.41 * 1000 is 8410.000000000002 in binary
        (8.4101, 8411),
        (0.001, 1),
        (0.0001, 1),
        (1e-300, 1),
        (1.1, 1100),
        (0.07, 70),
        (2147483.647, 2**31 - 1),
    ],
)
def test_user_timeout_is_rounded_up_to_whole_milliseconds(given_seconds: float, milliseconds: int) -> None:
    """To the next millisecond, and not one further because of binary fractions."""
    assert Keepalive(1, 1, 1, user_timeout=given_seconds).user_timeout == milliseconds / 1000


@given(user_timeouts)
def test_the_user_timeout_is_rounded_up_by_less_than_a_millisecond_and_only_once(given_seconds: float) -> None:
    """A value that the kernel accepts is not changed."""
    rounded = Keepalive(1, 1, 1, user_timeout=given_seconds).user_timeout
    assert isinstance(rounded, float)
    assert given_seconds <= rounded < given_seconds + 0.001 + 1e-9
    assert Keepalive(1, 1, 1, user_timeout=rounded).user_timeout == rounded


@given(seconds)
def test_a_time_is_rounded_up_by_less_than_a_second_and_only_once(given_seconds: float) -> None:
    """A value that the kernel accepts is not changed."""
    rounded = Keepalive(given_seconds).idle
    assert rounded is not None
    assert given_seconds <= rounded < given_seconds + 1 or rounded == 1
    assert rounded == int(rounded)
    assert Keepalive(rounded).idle == rounded


def test_subclasses_of_int_and_float_are_numbers() -> None:
    """numpy's and IntEnum's: the value counts, and their repr does not appear in the policy's."""

    class Reading(float):
        def __repr__(self) -> str:
            return f"Reading({float(self)})"

    class Seconds(enum.IntEnum):
        LONG = 60

    policy = Keepalive(Reading(20), Reading(9.5), 4, user_timeout=Reading(60.0))
    assert policy == Keepalive(20, 10, 4, user_timeout=60)
    assert repr(policy) == "Keepalive(20, 10, 4, user_timeout=60.0)"
    assert Keepalive(Seconds.LONG, count=1, user_timeout=Seconds.LONG) == Keepalive(60, count=1, user_timeout=60)


# -- detect and hold


@given(st.integers(2, 200_000) | st.floats(2, 1e9))
@example(2)
@example(2.999)
@example(98_299)
@example(98_300)
@example(98_301)
@example(98_302)
@example(1e300)
def test_detect_never_takes_longer_than_asked(within: float) -> None:
    """The detection time is at most the given time, and equals it within the kernel's limits."""
    found = Keepalive.detect(within).detection_time
    assert found is not None
    assert found <= within
    assert found == math.floor(within) or within > 98_000


def test_detecting_within_a_minute_is_the_default() -> None:
    """detect(within=60) is the default policy, whose detection time is 60 s."""
    assert Keepalive.detect(within=60) == Keepalive()


@pytest.mark.parametrize(
    ("within", "policy"),
    [
        (2, Keepalive(1, 1, 1)),
        (3, Keepalive(1, 1, 2)),
        (4, Keepalive(1, 1, 3)),
        (5, Keepalive(1, 1, 4)),
        (30, Keepalive(10, 5, 4)),
        (30.9, Keepalive(10, 5, 4)),
        (90, Keepalive(30, 15, 4)),
    ],
)
def test_detect_sets_idle_to_a_third_and_count_to_four(within: float, policy: Keepalive) -> None:
    """Fewer probes below five seconds; fractions of a second are dropped."""
    assert Keepalive.detect(within) == policy


@given(st.integers(3, 200_000) | st.floats(3, 1e9))
@example(3)
@example(3.999)
@example(350)
@example(65_534)
@example(1e300)
def test_hold_stays_below_the_limit_with_one_probe_lost(against: float) -> None:
    """The second probe is sent in time, even when the kernel's timers fire 12.5 % late."""
    policy = Keepalive.hold(against)
    assert policy.idle is not None
    assert policy.interval is not None
    assert policy.idle + policy.interval < against
    if against >= 8:
        assert (policy.idle + policy.interval) * 1.125 < against


@given(st.floats(8, 60_000))
def test_hold_probes_no_more_often_than_needed(against: float) -> None:
    """The first probe is sent at about half of the limit, so that an idle connection costs little."""
    policy = Keepalive.hold(against)
    assert policy.idle is not None
    assert against / 2 - 1 <= policy.idle <= against / 2


# -- derived values


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Keepalive(), 60),
        (Keepalive(1, 1, 1), 2),
        (Keepalive(user_timeout=None), 60),
        (Keepalive(user_timeout=41), 60),  # enforced by kaio: the probes are not affected
        (Keepalive(stalled="drop"), 60),
        (Keepalive(user_timeout=60, stalled="drop"), 60),
        (Keepalive(user_timeout=41, stalled="drop"), 50),  # checked when a probe is due: 20, 30, 40, 50
        (Keepalive(user_timeout=600, stalled="drop"), 600),
        (Keepalive(20, 10, 1, user_timeout=5, stalled="drop"), 30),
        (Keepalive(user_timeout=None, stalled="drop"), 60),
        (Keepalive.OFF, math.inf),
        (Keepalive.SYSTEM, None),
        (Keepalive(None), None),
        (Keepalive(interval=None), None),
        (Keepalive(count=None), None),
    ],
    ids=str,
)
def test_detection_time_is_idle_and_all_intervals(policy: Keepalive, expected: float | None) -> None:
    """idle + interval * count; a user timeout that the kernel enforces replaces the count."""
    assert policy.detection_time == expected


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Keepalive(), 60),
        (Keepalive(user_timeout=45), 45),
        (Keepalive(user_timeout=None), None),
        (Keepalive(None), None),
        (Keepalive(None, user_timeout=45), 45),
        (Keepalive.SYSTEM, None),
        (Keepalive.OFF, None),
    ],
    ids=str,
)
def test_user_timeout_follows_the_detection_time_unless_given(policy: Keepalive, expected: float | None) -> None:
    """AUTO is the detection time, None is unbounded."""
    assert policy.effective_user_timeout == expected


def test_timeline_lists_the_probes_and_the_end() -> None:
    """Each probe at its time, and then "dead"."""
    assert Keepalive().timeline() == (
        Step(20, "probe 1 of 4"),
        Step(30, "probe 2 of 4"),
        Step(40, "probe 3 of 4"),
        Step(50, "probe 4 of 4"),
        Step(60, "dead"),
    )
    assert Keepalive(user_timeout=41, stalled="drop").timeline()[-2:] == (Step(40, "probe 3 of 3"), Step(50, "dead"))


@given(st.builds(Keepalive, st.integers(1, 100), st.integers(1, 100), counts))
def test_timeline_runs_from_the_idle_time_to_the_detection_time(policy: Keepalive) -> None:
    """One step for each probe and one for the end, in order."""
    steps = policy.timeline()
    times = [step.at for step in steps]
    assert times == sorted(set(times))
    assert times[0] == policy.idle
    assert times[-1] == policy.detection_time
    assert len(steps) == (policy.count or 0) + 1


def test_off_has_an_empty_timeline() -> None:
    """Without keepalive no probe is sent."""
    assert Keepalive.OFF.timeline() == ()


@pytest.mark.parametrize("field", ["idle", "interval", "count"])
def test_timeline_needs_all_times(field: str) -> None:
    """A field that is None has to be set first; the error names it."""
    policy = make_policy(**{field: None})
    with pytest.raises(PolicyError, match=rf"{field}=None: .*filled\(\)") as caught:
        policy.timeline()
    assert caught.value.field == field


def test_filled_replaces_only_fields_that_are_none() -> None:
    """Other values stay."""
    system = {"idle": 7200, "interval": 75, "count": 9}
    assert Keepalive(30, None, 3, user_timeout=None).filled(**system) == Keepalive(30, 75, 3, user_timeout=None)
    assert Keepalive().filled(**system) == Keepalive()
    assert Keepalive.SYSTEM.filled(**system) == Keepalive(7200, 75, 9, user_timeout=None)
    assert Keepalive.OFF.filled(**system) is Keepalive.OFF


def test_filled_refuses_times_for_which_the_user_timeout_is_too_short() -> None:
    """The user timeout is checked once the times are known."""
    policy = Keepalive(None, None, None, user_timeout=30)
    with pytest.raises(PolicyError, match="at least idle \\+ 2 \\* interval = 7350 s") as caught:
        policy.filled(idle=7200, interval=75, count=9)
    assert caught.value.field == "user_timeout"


# -- the environment


@pytest.mark.parametrize(
    ("environ", "policy"),
    [
        ({}, Keepalive()),
        ({"KAIO_KEEPALIVE": "detect=30s"}, Keepalive.detect(30)),
        ({"KAIO_KEEPALIVE": " off "}, Keepalive.OFF),
        ({"KAIO_KEEPALIVE": "on"}, Keepalive.SYSTEM),
        ({"KAIO_KEEPALIVE": "20s:10s:4", "KEEPALIVE": "off", "KEEPIDLE": "junk"}, Keepalive()),
        ({"KAIO_KEEPALIVE": "off", "KEEPALIVE": "on", "KEEPIDLE": "30"}, Keepalive.OFF),
        ({"KAIO_KEEPALIVE": "", "KEEPALIVE": "off"}, Keepalive.OFF),
        ({"KAIO_KEEPALIVE": "  ", "KEEPALIVE": " ", "KEEPIDLE": "", "KEEPINTVL": "", "KEEPCNT": " "}, Keepalive()),
        ({"KEEPALIVE": "on"}, Keepalive()),
        ({"KEEPALIVE": "OFF"}, Keepalive.OFF),
        ({"KEEPALIVE": "off", "KEEPIDLE": "30"}, Keepalive.OFF),
        ({"KEEPIDLE": "30"}, Keepalive(30)),
        ({"KEEPINTVL": "5"}, Keepalive(interval=5)),
        ({"KEEPCNT": "3"}, Keepalive(count=3)),
        ({"KEEPALIVE": "on", "KEEPIDLE": "30", "KEEPINTVL": "5", "KEEPCNT": "3"}, Keepalive(30, 5, 3)),
        ({"KEEPIDLE": "1m", "KEEPINTVL": " 5s "}, Keepalive(60, 5)),
        ({"UNRELATED": "1"}, Keepalive()),
    ],
)
def test_environment_sets_the_default(environ: Mapping[str, str], policy: Keepalive) -> None:
    """KAIO_KEEPALIVE takes precedence over libkeepalive's variables; an empty variable counts as not set."""
    assert Keepalive.from_env(environ) == policy


def test_environment_of_the_process_is_read_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """from_env() and keepalive=None read the current os.environ."""
    assert Keepalive.from_env() == as_policy(None) == Keepalive()
    monkeypatch.setenv("KEEPIDLE", "30")
    assert Keepalive.from_env() == as_policy(None) == Keepalive(30)
    monkeypatch.setenv("KAIO_KEEPALIVE", "off")
    assert Keepalive.from_env() == as_policy(None) == Keepalive.OFF
    assert as_policy(True) == Keepalive()


@pytest.mark.parametrize(
    ("argument", "policy"),
    [
        (Keepalive(7), Keepalive(7)),
        (Keepalive.OFF, Keepalive.OFF),
        ("20s:10s:4", Keepalive()),
        ("off", Keepalive.OFF),
        (True, Keepalive()),
        (False, Keepalive.OFF),
        (None, Keepalive()),
    ],
    ids=repr,
)
def test_keepalive_arguments_are_a_policy_text_a_boolean_or_none(argument: KeepaliveArg, policy: Keepalive) -> None:
    """as_policy converts each of them."""
    assert as_policy(argument) == policy


# -- immutability, equality, copies


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Keepalive)])
def test_policies_are_frozen(field: str) -> None:
    """No field of a policy can be changed or removed."""
    policy = Keepalive()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(policy, field, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        delattr(policy, field)
    assert policy == Keepalive(20, 10, 4)


def test_equal_policies_have_equal_hashes() -> None:
    """Compared by their values after rounding."""
    assert len({Keepalive(), Keepalive(20.0, 9.1, 4), Keepalive.parse("20s:10s:4"), Keepalive(user_timeout=None)}) == 2


def test_off_and_system_are_not_equal() -> None:
    """They differ in one field, which no argument sets."""
    assert Keepalive.OFF != Keepalive.SYSTEM
    assert not Keepalive.OFF.enabled
    assert Keepalive.SYSTEM.enabled
    with pytest.raises(TypeError, match="enabled"):
        make_policy(enabled=False)


@given(policies)
def test_copies_and_pickles_are_equal(policy: Keepalive) -> None:
    """A policy can be sent to another process."""
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(policy, protocol)) == policy
    assert copy.copy(policy) == policy
    assert copy.deepcopy(policy) == policy
    assert hash(copy.deepcopy(policy)) == hash(policy)


@given(policies)
def test_copies_keep_auto_itself(policy: Keepalive) -> None:
    """AUTO is compared by identity."""
    assert (pickle.loads(pickle.dumps(policy)).user_timeout is AUTO) == (policy.user_timeout is AUTO)
    assert copy.deepcopy(AUTO) is AUTO
    assert repr(AUTO) == "AUTO"
    assert isinstance(AUTO, Auto)


def test_replace_makes_another_valid_policy() -> None:
    """dataclasses.replace checks the new policy; a copy of OFF is enabled."""
    assert dataclasses.replace(Keepalive(), idle=29.5) == Keepalive(30)
    assert dataclasses.replace(Keepalive.SYSTEM, count=3) == Keepalive(None, None, 3, user_timeout=None)
    assert dataclasses.replace(Keepalive.OFF, idle=5).enabled
    assert dataclasses.replace(Keepalive.OFF, idle=5) == Keepalive(5, None, None, user_timeout=None)
    with pytest.raises(PolicyError, match="count=0: must be from 1 to 127"):
        dataclasses.replace(Keepalive(), count=0)


@pytest.mark.parametrize(
    ("state", "detection_time", "text"),
    [
        (SocketState(enabled=False), math.inf, "off"),
        (SocketState(enabled=False, idle=7200, interval=75, count=9), math.inf, "off"),
        (SocketState(enabled=True, idle=20, interval=10, count=4), 60, "20s:10s:4"),
        (
            SocketState(enabled=True, idle=20, interval=10, count=4, user_timeout=8.41),
            60,
            "20s:10s:4,user_timeout=8410ms",
        ),
        (SocketState(enabled=False, user_timeout=60), math.inf, "off,user_timeout=60s"),
        (SocketState(enabled=True), None, "?:?:?"),
    ],
    ids=str,
)
def test_text_and_detection_time_of_socket_states(state: SocketState, detection_time: float | None, text: str) -> None:
    """An unknown value is a question mark, and makes the detection time unknown."""
    assert state.detection_time == detection_time
    assert str(state) == text


# -- invalid policies


def check(error: PolicyError, field: str, value: object, part: str) -> None:
    """The error is exactly a PolicyError, and has the field, the value and the limit."""
    assert type(error) is PolicyError
    assert isinstance(error, (KaioError, ValueError))
    assert error.field == field
    assert error.value is value or error.value == value
    assert str(error) == f"{field}={error.value!r}: {error.limit}"
    assert part in error.limit


NAN, INF = float("nan"), float("inf")
NUMBER = "must be a number of seconds"
RANGE = "must be at most 32767 s"
COUNT = "must be from 1 to 127"
WHOLE = "must be a whole number"
ONE_LOST = "must be at least idle + 2 * interval = "


@pytest.mark.parametrize(
    ("arguments", "field", "part"),
    [
        *[
            ({field: value}, field, part)
            for field in ("idle", "interval")
            for value, part in [
                (NAN, "must be finite"),
                (INF, "must be finite"),
                (-INF, "must be finite"),
                (True, NUMBER),
                (False, NUMBER),
                ("20", NUMBER),
                ("20s", NUMBER),
                ("", NUMBER),
                (b"20", NUMBER),
                ([20], NUMBER),
                ((20,), NUMBER),
                (20j, NUMBER),
                (Decimal(20), NUMBER),
                (Fraction(20), NUMBER),
                (AUTO, NUMBER),
                (0, "must be above 0"),
                (0.0, "must be above 0"),
                (-0.0, "must be above 0"),
                (-20, "must be above 0"),
                (-0.5, "must be above 0"),
                (32768, RANGE),
                (32767.001, RANGE),
                (1e300, RANGE),
            ]
        ],
        *[
            ({"count": value}, "count", part)
            for value, part in [
                (0, COUNT),
                (-1, COUNT),
                (128, COUNT),
                (10**30, COUNT),
                (4.0, WHOLE),
                (2.5, WHOLE),
                (NAN, WHOLE),
                (INF, WHOLE),
                (True, WHOLE),
                ("4", WHOLE),
                (b"4", WHOLE),
                ([4], WHOLE),
                (Decimal(4), WHOLE),
                (AUTO, WHOLE),
            ]
        ],
        *[
            ({"user_timeout": value}, "user_timeout", part)
            for value, part in [
                (NAN, "must be finite"),
                (INF, "must be finite"),
                (-INF, "must be finite"),
                (0, "must be above 0"),
                (-60, "must be above 0"),
                (True, NUMBER),
                (False, NUMBER),
                ("60", NUMBER),
                ("auto", NUMBER),
                (b"60", NUMBER),
                ([60], NUMBER),
                (2147483.648, "must be at most 2147483.647 s"),
                (1e300, "must be at most 2147483.647 s"),
                (1, ONE_LOST + "40 s"),
                (30, ONE_LOST + "40 s"),
                (39.999, ONE_LOST + "40 s"),
            ]
        ],
        ({"idle": 10, "interval": 5, "count": 2, "user_timeout": 19.999}, "user_timeout", ONE_LOST + "20 s"),
        ({"idle": 10, "interval": 5, "count": None, "user_timeout": 15}, "user_timeout", ONE_LOST + "20 s"),
        ({"user_timeout": 35, "stalled": "drop"}, "user_timeout", ONE_LOST + "40 s"),
        ({"idle": 9.5, "interval": 4.5, "user_timeout": 18.5}, "user_timeout", ONE_LOST + "20 s"),
        *[
            ({"stalled": value}, "stalled", "must be 'keep' or 'drop'")
            for value in ("drp", "", "KEEP", None, True, b"keep", ["keep"], ("keep", "drop"))
        ],
    ],
    ids=repr,
)
def test_invalid_values_are_refused(arguments: dict[str, object], field: str, part: str) -> None:
    """The constructor accepts nothing that the kernel would refuse or interpret otherwise."""
    with pytest.raises(PolicyError) as caught:
        make_policy(**arguments)
    check(caught.value, field, arguments[field], part)


@pytest.mark.parametrize("field", ["idle", "interval", "user_timeout"])
def test_numbers_beyond_any_float_are_refused(field: str) -> None:
    """An int too large for a float raises PolicyError, not OverflowError."""
    with pytest.raises(PolicyError, match=f"^{field}=1000") as caught:
        make_policy(**{field: 10**400})
    assert caught.value.field == field


def test_an_automatic_user_timeout_above_the_kernels_limit_is_refused() -> None:
    """With stalled="drop" the kernel would get the detection time, which is above its limit here."""
    with pytest.raises(PolicyError, match=r"2147483\.647 s") as caught:
        Keepalive(MAX_SECONDS, MAX_SECONDS, MAX_COUNT, stalled="drop")
    assert caught.value.field == "user_timeout"


def test_user_timeouts_at_the_limits_are_accepted() -> None:
    """The lowest and the highest valid values."""
    assert Keepalive(user_timeout=40).user_timeout == 40
    assert Keepalive(count=1, user_timeout=0.001).user_timeout == 0.001
    assert Keepalive(user_timeout=2147483.647).user_timeout == MAX_USER_TIMEOUT
    assert Keepalive(None, user_timeout=1).user_timeout == 1
    assert Keepalive(MAX_SECONDS, MAX_SECONDS, MAX_COUNT).detection_time == 32767 * 128


FORM = "must be 'on', 'off', 'idle:interval:count'"
TIME = "must be a time such as 20s"


@pytest.mark.parametrize(
    ("text", "field", "value", "part"),
    [
        *[(text, "keepalive", text, FORM) for text in ["", "  ", "20s", "20", "60", "20s:10s", "20s:10s:4:1", "yes"]],
        *[(text, "keepalive", text, FORM) for text in ["true", "1", "none", "on off", "２０", "\0"]],
        ("20s:10s:four", "count", "four", WHOLE),
        ("20s:10s:4.0", "count", "4.0", WHOLE),
        ("20s:10s:-4", "count", "-4", WHOLE),
        ("20s:10s:+4", "count", "+4", WHOLE),
        ("20s:10s:1_0", "count", "1_0", WHOLE),
        ("20s:10s:4s", "count", "4s", WHOLE),
        ("20s:10s:٤", "count", "٤", WHOLE),
        ("20s:10s:４", "count", "４", WHOLE),
        ("20s:10s:²", "count", "²", WHOLE),
        ("20s:10s:" + "9" * 19, "count", "9" * 19, WHOLE),
        ("20s:10s:0", "count", 0, COUNT),
        ("20s:10s:128", "count", 128, COUNT),
        ("-20s:10s:4", "idle", "-20s", TIME),
        ("+20s:10s:4", "idle", "+20s", TIME),
        ("20x:10s:4", "idle", "20x", TIME),
        ("20 s:10s:4", "idle", "20 s", TIME),
        ("s:10s:4", "idle", "s", TIME),
        ("1e3:10s:4", "idle", "1e3", TIME),
        ("0x10:10s:4", "idle", "0x10", TIME),
        ("1_0s:10s:4", "idle", "1_0s", TIME),
        (".5s:10s:4", "idle", ".5s", TIME),
        ("1m30:10s:4", "idle", "1m30", TIME),
        ("nan:10s:4", "idle", "nan", TIME),
        ("inf:10s:4", "idle", "inf", TIME),
        ("２０s:10s:4", "idle", "２０s", TIME),
        ("٢٠s:10s:4", "idle", "٢٠s", TIME),
        ("20s:۱۰s:4", "interval", "۱۰s", TIME),
        ("1" * 201 + ":10s:4", "idle", "1" * 201, TIME),
        ("0s:10s:4", "idle", 0, "must be above 0"),
        ("20s:0:4", "interval", 0, "must be above 0"),
        ("10h:10s:4", "idle", 36000, RANGE),
        ("20s:1d:4", "interval", 86400, RANGE),
        ("9" * 200 + ":10s:4", "idle", int("9" * 200), RANGE),
        ("idle=20s,idle=30s", "idle", "30s", "is given twice in 'idle=20s,idle=30s'"),
        ("idle=20s,count=3,idle=20s", "idle", "20s", "is given twice"),
        ("detect=30s,detect=30s", "detect", "30s", "is given twice"),
        (
            "foo=3",
            "foo",
            "3",
            "is not a field; the fields are idle, interval, count, user_timeout, stalled, detect, hold",
        ),
        ("enabled=false", "enabled", "false", "is not a field"),
        ("tcp_keepidle=20", "tcp_keepidle", "20", "is not a field"),
        ("idle=20s,keepalive=on", "keepalive", "on", "is not a field"),
        ("idle=", "keepalive", "idle=", "'idle=' must be of the form name=value"),
        ("idle=20s,", "keepalive", "idle=20s,", "'' must be of the form name=value"),
        ("idle=20s,,count=4", "keepalive", "idle=20s,,count=4", "'' must be of the form name=value"),
        ("idle=20s,count", "keepalive", "idle=20s,count", "'count' must be of the form name=value"),
        ("20s:10s:4,idle=3", "idle", "3", "is given twice in '20s:10s:4,idle=3'"),
        (
            "20s:10s:4,detect=30s",
            "keepalive",
            "20s:10s:4,detect=30s",
            "detect= cannot be combined with other fields",
        ),
        ("20s:10s:4,", "keepalive", "20s:10s:4,", "'' must be of the form name=value"),
        ("on,stalled=drop", "keepalive", "on,stalled=drop", "'on' cannot be combined with other fields"),
        ("detect=30s,count=3", "keepalive", "detect=30s,count=3", "detect= cannot be combined with other fields"),
        ("count=3,detect=30s", "keepalive", "count=3,detect=30s", "detect= cannot be combined with other fields"),
        ("hold=350s,idle=20s", "keepalive", "hold=350s,idle=20s", "hold= cannot be combined with other fields but"),
        (
            "detect=30s,hold=350s",
            "keepalive",
            "detect=30s,hold=350s",
            "detect= cannot be combined with other fields",
        ),
        ("detect=soon", "detect", "soon", TIME),
        ("hold=auto", "hold", "auto", TIME),
        ("detect=1s", "within", 1, "must be at least 2 s"),
        ("detect=0", "within", 0, "must be above 0"),
        ("hold=2.9s", "against", 2.9, "must be at least 3 s"),
        ("idle=none", "idle", "none", TIME),
        ("idle=20s=30s", "idle", "20s=30s", TIME),
        ("count=none", "count", "none", WHOLE),
        ("user_timeout=system", "user_timeout", "system", TIME),
        ("user_timeout=30s", "user_timeout", 30, ONE_LOST + "40 s"),
        ("user_timeout=25d", "user_timeout", 2160000, "must be at most 2147483.647 s"),
        ("stalled=maybe", "stalled", "maybe", "must be 'keep' or 'drop'"),
    ],
)
def test_invalid_text_is_refused(text: str, field: str, value: object, part: str) -> None:
    """The error says which part of the text is wrong."""
    with pytest.raises(PolicyError) as caught:
        Keepalive.parse(text)
    check(caught.value, field, value, part)


@given(st.text() | st.text(alphabet="0123456789smhd:=,. \tonfidlecutkp", max_size=30))
def test_any_text_gives_a_policy_or_a_policy_error(text: str) -> None:
    """No text from a configuration file raises another exception."""
    try:
        policy = Keepalive.parse(text)
    except PolicyError:
        return
    assert Keepalive.parse(str(policy)) == policy


@pytest.mark.parametrize("value", [None, b"on", 20, 20.0, True, ["on"], ("20s", "10s", 4), Keepalive()], ids=repr)
def test_parse_accepts_only_str(value: Any) -> None:
    """Other types are refused, bytes too."""
    with pytest.raises(PolicyError) as caught:
        Keepalive.parse(value)
    check(caught.value, "keepalive", value, "must be a string such as '20s:10s:4'")


@pytest.mark.parametrize("value", [0, 1, 20, 20.0, b"on", [], ["on"], (20, 10, 4), {"idle": 20}, AUTO, ...], ids=repr)
def test_other_keepalive_arguments_are_refused(value: Any) -> None:
    """Numbers are refused too, because they could be any of the fields."""
    with pytest.raises(PolicyError) as caught:
        as_policy(value)
    check(
        caught.value,
        "keepalive",
        value,
        "must be a Keepalive, a string such as '20s:10s:4' or 'detect=30s', True, False or None",
    )


@pytest.mark.parametrize(
    ("environ", "variable", "value", "part"),
    [
        ({"KAIO_KEEPALIVE": "nonsense"}, "KAIO_KEEPALIVE", "nonsense", "keepalive: " + FORM),
        ({"KAIO_KEEPALIVE": "20s:10s:200"}, "KAIO_KEEPALIVE", "20s:10s:200", "count: " + COUNT),
        ({"KAIO_KEEPALIVE": "20", "KEEPALIVE": "off"}, "KAIO_KEEPALIVE", "20", FORM),
        ({"KAIO_KEEPALIVE": "２０s:10s:4"}, "KAIO_KEEPALIVE", "２０s:10s:4", "idle: " + TIME),
        ({"KEEPALIVE": "maybe"}, "KEEPALIVE", "maybe", "must be 'on' or 'off'"),
        ({"KEEPALIVE": "20s:10s:4"}, "KEEPALIVE", "20s:10s:4", "must be 'on' or 'off'"),
        ({"KEEPIDLE": "soon"}, "KEEPIDLE", "soon", TIME),
        ({"KEEPIDLE": "-1"}, "KEEPIDLE", "-1", TIME),
        ({"KEEPIDLE": "nan"}, "KEEPIDLE", "nan", TIME),
        ({"KEEPIDLE": "0"}, "KEEPIDLE", 0, "must be above 0"),
        ({"KEEPINTVL": "40000"}, "KEEPINTVL", 40000, RANGE),
        ({"KEEPCNT": "0"}, "KEEPCNT", 0, COUNT),
        ({"KEEPCNT": "4.5"}, "KEEPCNT", "4.5", WHOLE),
        ({"KEEPCNT": "４"}, "KEEPCNT", "４", WHOLE),
    ],
)
def test_invalid_environment_variables_are_refused(
    environ: Mapping[str, str], variable: str, value: object, part: str
) -> None:
    """The error names the variable."""
    with pytest.raises(PolicyError) as caught:
        Keepalive.from_env(environ)
    check(caught.value, variable, value, part)


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (NAN, "must be finite"),
        (INF, "must be finite"),
        (True, NUMBER),
        ("30s", NUMBER),
        (None, NUMBER),
        (b"30", NUMBER),
        ([30], NUMBER),
        (0, "must be above 0"),
        (-30, "must be above 0"),
        (1, "must be at least "),
        (1.999, "must be at least "),
    ],
    ids=repr,
)
@pytest.mark.parametrize(("make", "field"), [(Keepalive.detect, "within"), (Keepalive.hold, "against")])
def test_detect_and_hold_refuse_invalid_times(make: Maker, field: str, value: object, part: str) -> None:
    """The error names the argument of the classmethod."""
    with pytest.raises(PolicyError) as caught:
        make(value)
    check(caught.value, field, value, part)


@pytest.mark.parametrize("make", [Keepalive.detect, Keepalive.hold])
def test_detect_and_hold_accept_ints_beyond_any_float(make: Maker) -> None:
    """The result is that of a very long time, or a PolicyError, but no OverflowError."""
    try:
        policy = make(10**400)
    except PolicyError as error:
        assert "must be" in error.limit  # noqa: PT017 - either answer will do
    else:
        assert policy == make(1e300)


def test_policy_names_are_exported_by_the_package() -> None:
    """They are the same objects."""
    assert kaio.Keepalive is Keepalive
    assert kaio.AUTO is AUTO


@pytest.mark.parametrize("stalled", ["keep", "drop"])
@pytest.mark.parametrize("task", ["detect=30s", "hold=350s", "detect=5s"])
def test_a_task_may_say_what_becomes_of_stalled_peers(task: str, stalled: str) -> None:
    """In either order; and the text of the policy means the same policy."""
    policy = Keepalive.parse(f"{task},stalled={stalled}")
    assert policy == Keepalive.parse(f"stalled={stalled},{task}") == Keepalive.parse(str(policy))
    assert policy.stalled == stalled
    assert dataclasses.replace(policy, stalled="keep") == Keepalive.parse(task)
