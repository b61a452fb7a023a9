"""Which parts `up` has to start, and why. Decided before anything is stopped or written."""

from __future__ import annotations

from dataclasses import dataclass, field

import psutil

from infra import certificates, processes, servers
from infra.at_work import jobs_at_work
from infra.home import Home, State
from infra.parts import PARTS, PORTS, make_server
from infra.processes import Running, StackError

PATIENCE_S = 30.0
"""How long a part that runs may leave questions unanswered before `up` takes it for hanging; each may wait 10 s."""

JOBS_SHOWN = 5


@dataclass
class Plan:
    reasons: dict[str, str] = field(default_factory=dict)  # why a part is started; "" for one that does not run
    moves: list[str] = field(default_factory=list)  # ports that others took, in words


def plan(home: Home, state: State) -> Plan:
    """What to start. Chooses ports in `state`, which is not written yet.

    The order matters: what a part learns at its start are its own ports and those of the parts before it.
    """
    made = Plan()
    for part in PARTS:
        _fill_ports(part, state)
    for part in PARTS:
        running = state.running.get(part)
        if running is None:
            made.reasons[part] = ""
        else:
            reason = stale(part, home, state, running) or processes.why_silent(
                make_server(part, home, state), running, PATIENCE_S
            )
            if reason is None:
                continue
            made.reasons[part] = reason
        made.moves += _leave_taken_ports(part, state)
    return made


def stale(part: str, home: Home, state: State, running: Running) -> str | None:
    """Why a part that may well answer is of no use any more; None when it knows all that it must know."""
    if not processes.alive(running):
        return f"it ended by itself (pid {running.pid})"
    if not has_ports(state) or not running.told:
        return "another version started it"
    if make_server(part, home, state).told != running.told:
        return "it must learn the new ports and logins of the stack"
    if part == "s3" and not certificates.good(home.folder / "s3" / "tls"):
        return "its certificates expire or are damaged"
    return None


def refuse_to_end_jobs(home: Home, state: State, made: Plan) -> None:
    """`StackError` when the Ray head, which the plan ends, runs jobs."""
    running = state.running.get("ray")
    if running is None:
        return
    server = make_server("ray", home, state)
    token = home.token_file.read_text().strip()
    jobs = jobs_at_work(server.url, {"Authorization": f"Bearer {token}"}, processes.session(running))
    if jobs:
        told = ", ".join(jobs[:JOBS_SHOWN]) + (f" and {len(jobs) - JOBS_SHOWN} more" if len(jobs) > JOBS_SHOWN else "")
        why = " and ".join([*(move.partition(":")[0] for move in made.moves), made.reasons["ray"]])
        raise StackError(
            f"the Ray head has to be started again, because {why}, and that would end what runs on it: {told}; nothing"
            " was changed: wait for these jobs or stop them and repeat the command, or end them with `python -m"
            " infra.local up --replace` (a training that is started again goes on from its newest checkpoint)"
        )


def has_ports(state: State) -> bool:
    """Whether it has all that this version wants; not so before the first start and after one by another version."""
    return all(name in state.ports for part in PARTS for name in PORTS[part])


# --- ports ----------------------------------------------------------------------------------------------------------


def _fill_ports(part: str, state: State) -> None:
    """Gives the part the ports that it has not yet."""
    for name in PORTS[part]:
        if name not in state.ports:
            state.ports |= processes.free_ports([name], _partner(name), apart_from=_with_partners(state))


def _leave_taken_ports(part: str, state: State) -> list[str]:
    """Chooses again where another program listens by now; says so in words."""
    moves = []
    running = state.running.get(part)
    if running:
        processes.wait_for_ending(running)
    own = _listening(running) if running else set()
    for name in PORTS[part]:
        old = state.ports[name]
        if all(port in own or processes.port_is_free(port) for port in {old, old + _partner(name)}):
            continue
        del state.ports[name]
        state.ports |= processes.free_ports([name], _partner(name), apart_from=[old, *_with_partners(state)])
        moves.append(f"port {old} ({name}) is used by another program: {state.ports[name]} from now on")
    return moves


def _listening(running: Running) -> set[int]:
    """The ports of a part that is going to be stopped, so they will be free."""
    ports = set()
    for process in processes.session(running):
        try:
            connections = process.net_connections(kind="tcp")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        ports |= {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}
    return ports


def _partner(name: str) -> int:
    return servers.S3_ADMIN_PARTNER if name == "s3_admin" else 0


def _with_partners(state: State) -> set[int]:
    return {port for name, old in state.ports.items() for port in (old, old + _partner(name))}
