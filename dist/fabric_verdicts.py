"""What `leyden check` says of the facts that the ranks have gathered: one row a check.

Pure functions of plain records, so that each verdict can be read, and tested, without a cluster.
A row names the nodes that it is about; those, and no others, can be left out of a submit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dist.fabric_rows import FAIL, OK, SKIPPED, WARN, Row, nodes_of

GIB = float(1 << 30)
# dist.lease takes clocks to agree within a few seconds.
CLOCK_WARN_S, CLOCK_FAIL_S = 1.0, 5.0
SLOW, VERY_SLOW = 0.5, 0.25
"""Of the best of the same kind: a pair's or a disk's speed that warns, and that fails."""
FREE_WARN_GIB, FREE_FAIL_GIB = 10.0, 0.1
SHM_WARN_GIB = 1.0


def devices(facts: Sequence[Mapping[str, Any]]) -> Row:
    """Every rank has a device of its own, of one kind, under one driver."""
    names = Counter(f"{one['device']['name']} ({one['device']['driver']})" for one in facts)
    value = ", ".join(f"{count} x {name}" for name, count in names.most_common())
    lacking = [f for f in facts if f["device"]["count"] < f["local_world_size"] > 0
               and f["device"]["kind"] == "cuda"]  # fmt: skip
    if lacking:
        first = lacking[0]
        return Row(
            check="devices", verdict=FAIL, value=value, nodes=nodes_of(lacking),
            advice=f"{first['local_world_size']} ranks a node see {first['device']['count']} "
            f"devices on {', '.join(nodes_of(lacking))}",
        )  # fmt: skip
    if len(names) > 1:
        usual = names.most_common(1)[0][0]
        odd = [f for f in facts if f"{f['device']['name']} ({f['device']['driver']})" != usual]
        return Row(
            check="devices", verdict=WARN, value=value, nodes=nodes_of(odd),
            advice=f"{', '.join(nodes_of(odd))} differ from the others ({usual})",
        )  # fmt: skip
    return Row(check="devices", verdict=OK, value=value)


def versions(facts: Sequence[Mapping[str, Any]]) -> Row:
    """The same code and libraries on all nodes."""
    problems, odd = [], []
    for name in sorted({key for one in facts for key in one["versions"]}):
        seen = Counter(one["versions"].get(name, "absent") for one in facts)
        usual = seen.most_common(1)[0][0]
        for one in facts:
            found = one["versions"].get(name, "absent")
            if found != usual:
                odd.append(one)
                problems.append(f"{name} {found} on {one['node']} ({usual} elsewhere)")
    value = f"{len(facts[0]['versions'])} versions compared"
    if problems:
        return Row(
            check="versions", verdict=FAIL, value=value, nodes=nodes_of(odd),
            advice="; ".join(dict.fromkeys(problems)),
        )  # fmt: skip
    return Row(check="versions", verdict=OK, value=value)


def all_reduce(facts: Sequence[Mapping[str, Any]]) -> Row:
    """Sums are right, bit for bit, on every rank."""
    results = [one["all_reduce"] for one in facts]
    world, first = len(facts), results[0]
    value = f"{first['elements']:,} elements over {world} ranks by {first['backend']}"
    wrong = [one for one in facts if one["all_reduce"]["wrong"]]
    if not wrong:
        return Row(check="all-reduce", verdict=OK, value=f"{value}, bitwise right")
    # All results wrong in the same way: what one rank put in was wrong, not what they got.
    blamed = sorted({rank for result in results for rank in result["blamed"]})
    named = [facts[rank] for rank in blamed] if len(wrong) == world and blamed else wrong
    count = max(one["all_reduce"]["wrong"] for one in wrong)
    what = "contribution" if named is not wrong else "result"
    return Row(
        check="all-reduce", verdict=FAIL, value=value, nodes=nodes_of(named),
        advice=f"the {what} of {_ranks(named)} is wrong in {count} of {first['elements']} "
        "elements: memory, device or link is damaged; take the node out",
    )  # fmt: skip


def bandwidth(facts: Sequence[Mapping[str, Any]]) -> Row:
    """No pair of ranks is much slower than its like; no byte changes on the way."""
    pairs = [pair for one in facts for pair in one["pairs"]]
    if not pairs:
        return Row(check="bandwidth", verdict=SKIPPED, value="one rank has no pairs")
    damaged = [pair for pair in pairs if pair["wrong"]]
    if damaged:
        nodes, named = _culprits(damaged, pairs, facts)
        return Row(
            check="bandwidth", verdict=FAIL, value=_speeds(pairs, facts), nodes=nodes,
            advice=f"bytes change between {named}: memory or link is damaged",
        )  # fmt: skip
    slow: list[Mapping[str, Any]] = []
    share = 1.0
    for group in _classes(pairs, facts).values():
        # The best; of many the tenth part is left out, as one may be lucky.
        reference = sorted((p["bytes_per_s"] for p in group), reverse=True)[len(group) // 10]
        below = [p for p in group if p["bytes_per_s"] < SLOW * reference]
        slow += below
        share = min([share, *(p["bytes_per_s"] / reference for p in below)])
    if not slow:
        return Row(check="bandwidth", verdict=OK, value=_speeds(pairs, facts))
    nodes, named = _culprits(slow, pairs, facts)
    return Row(
        check="bandwidth", verdict=FAIL if share < VERY_SLOW else WARN,
        value=_speeds(pairs, facts), nodes=nodes,
        advice=f"{named}: {share:.0%} of the best of its kind; look at the links, and at who else "
        "uses them",
    )  # fmt: skip


def _culprits(
    bad: Sequence[Mapping[str, Any]],
    pairs: Sequence[Mapping[str, Any]],
    facts: Sequence[Mapping[str, Any]],
) -> tuple[tuple[str, ...], str]:
    """(nodes, words): one rank if it is in all bad pairs and all its pairs are bad."""
    members = Counter(rank for pair in bad for rank in (pair["a"], pair["b"]))
    for rank, count in members.most_common():
        of_rank = sum(rank in (pair["a"], pair["b"]) for pair in pairs)
        if count == len(bad) == of_rank and of_rank > 1:
            return (facts[rank]["node"],), f"rank {rank} on {facts[rank]['node']} and all others"
    shown = [f"{p['a']} ({facts[p['a']]['node']}) and {p['b']} ({facts[p['b']]['node']})"
             for p in sorted(bad, key=lambda p: p["bytes_per_s"])[:4]]  # fmt: skip
    return (), f"ranks {', '.join(shown)}{' and others' if len(bad) > 4 else ''}"


def _classes(
    pairs: Sequence[Mapping[str, Any]], facts: Sequence[Mapping[str, Any]]
) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for pair in pairs:
        same = facts[pair["a"]]["node"] == facts[pair["b"]]["node"]
        found.setdefault("in a node" if same else "between nodes", []).append(pair)
    return found


def _speeds(pairs: Sequence[Mapping[str, Any]], facts: Sequence[Mapping[str, Any]]) -> str:
    words = []
    for kind, group in sorted(_classes(pairs, facts).items()):
        rates = [pair["bytes_per_s"] / 1e9 for pair in group]
        words.append(f"{kind} {min(rates):.2f}-{max(rates):.2f} GB/s ({len(group)} pairs)")
    return ", ".join(words)


def clocks(facts: Sequence[Mapping[str, Any]]) -> Row:
    """Leases and logs compare clocks of nodes."""
    offsets = {one["rank"]: one["clock"]["offset_s"] for one in facts}
    low, high = min(offsets, key=offsets.__getitem__), max(offsets, key=offsets.__getitem__)
    skew = offsets[high] - offsets[low]
    rtt = max(one["clock"]["rtt_s"] for one in facts)
    value = f"{skew * 1e3:.1f} ms apart at most (+- {rtt / 2 * 1e3:.1f} ms)"
    if skew <= CLOCK_WARN_S:
        return Row(check="clocks", verdict=OK, value=value)
    middle = sorted(offsets.values())[len(offsets) // 2]
    far = max(offsets, key=lambda rank: abs(offsets[rank] - middle))
    return Row(
        check="clocks", verdict=FAIL if skew > CLOCK_FAIL_S else WARN, value=value,
        nodes=(facts[far]["node"],),
        advice=f"the clock of {facts[far]['node']} is {offsets[far] - middle:+.1f} s off: start "
        "its time service (chrony, ntpd)",
    )  # fmt: skip


def disks(facts: Sequence[Mapping[str, Any]], index: int) -> Row:
    """One folder on every node: space, a durable write, its speed."""
    of_nodes = [one for one in facts if len(one["disks"]) > index]
    probes = [one["disks"][index] for one in of_nodes]
    check = f"disk {probes[0]['what']}"
    broken = [one for one in of_nodes if one["disks"][index]["error"]]
    if broken:
        said = [f"{one['node']}: {one['disks'][index]['error']}" for one in broken]
        return Row(
            check=check, verdict=FAIL, value=probes[0]["path"], nodes=nodes_of(broken),
            advice="; ".join(said[:4]),
        )  # fmt: skip
    free = min(probe["free_bytes"] for probe in probes) / GIB
    value = (
        f"{free:.1f} GiB free, write {_range(p['write_bytes_per_s'] for p in probes)}, fsync "
        f"{max(p['fsync_s'] for p in probes):.2f} s, read "
        f"{_range(p['read_bytes_per_s'] for p in probes)} MB/s"
    )
    best = max(probe["write_bytes_per_s"] for probe in probes)
    tight = [one for one in of_nodes if one["disks"][index]["free_bytes"] < FREE_WARN_GIB * GIB]
    slow = [one for one in of_nodes if one["disks"][index]["write_bytes_per_s"] < VERY_SLOW * best]
    if tight:
        verdict = FAIL if free < FREE_FAIL_GIB else WARN
        return Row(
            check=check, verdict=verdict, value=value, nodes=nodes_of(tight),
            advice=f"little space in {probes[0]['path']} on {', '.join(nodes_of(tight))}",
        )  # fmt: skip
    if slow:
        return Row(
            check=check, verdict=WARN, value=value, nodes=nodes_of(slow),
            advice=f"writing is slow on {', '.join(nodes_of(slow))}",
        )  # fmt: skip
    return Row(check=check, verdict=OK, value=value)


def shared_folder(facts: Sequence[Mapping[str, Any]], path: str) -> Row:
    """What one node writes into run_root the others see."""
    blind = [one for one in facts if one["sees_run_root"] is False]
    if len(nodes_of(facts)) == 1:
        return Row(check="run_root shared", verdict=SKIPPED, value="one node")
    if blind:
        return Row(
            check="run_root shared", verdict=FAIL, value=path, nodes=nodes_of(blind),
            advice=f"{', '.join(nodes_of(blind))} do not see what {facts[0]['node']} wrote; set "
            "run_root to a shared file system",
        )  # fmt: skip
    return Row(check="run_root shared", verdict=OK, value=path)


def shared_memory(facts: Sequence[Mapping[str, Any]]) -> Row:
    """/dev/shm, through which NCCL and worker processes pass data."""
    sizes = {one["node"]: one["shm_free_bytes"] / GIB for one in facts if "shm_free_bytes" in one}
    small = tuple(node for node, size in sizes.items() if size < SHM_WARN_GIB)
    value = f"{min(sizes.values()):.1f} GiB free" if sizes else "absent"
    if small or not sizes:
        return Row(
            check="/dev/shm", verdict=WARN, value=value, nodes=small,
            advice="containers get 64 MiB unless told (--shm-size); NCCL and loaders need more",
        )  # fmt: skip
    return Row(check="/dev/shm", verdict=OK, value=value)


def dataset(facts: Sequence[Mapping[str, Any]], expected: Mapping[str, str]) -> list[Row]:
    """The manifest, its shards and its tokenizer, as each node sees them."""
    seen = [one for one in facts if one.get("data")]
    if not seen:
        return [Row(check="dataset", verdict=SKIPPED, value="none given (--data.url)")]
    rows = []
    broken = [one for one in seen if one["data"]["error"]]
    digests = {one["data"]["data_digest"] for one in seen if not one["data"]["error"]}
    wanted = expected.get("data_digest", "")
    value = ", ".join(f"version {digest[:12]}" for digest in sorted(digests)) or "not readable"
    if broken:
        said = "; ".join(f"{one['node']}: {one['data']['error']}" for one in broken[:3])
        rows.append(Row(check="dataset", verdict=FAIL, value=value, advice=said,
                        nodes=nodes_of(broken)))  # fmt: skip
    elif len(digests) > 1 or (wanted and digests != {wanted}):
        asked = f", but the run trains on {wanted[:12]}" if wanted else ""
        rows.append(Row(check="dataset", verdict=FAIL, value=value,
                        advice=f"the nodes read {value}{asked}"))  # fmt: skip
    else:
        count = seen[0]["data"]["shards"]
        rows.append(Row(check="dataset", verdict=OK, value=f"{value}, {count} shards there"))
    tokenizers = {one["data"]["tokenizer_digest"] for one in seen if not one["data"]["error"]}
    wanted = expected.get("tokenizer_digest", "")
    value = ", ".join(str(digest)[:12] for digest in sorted(map(str, tokenizers)))
    if len(tokenizers) > 1 or (wanted and tokenizers and tokenizers != {wanted}):
        rows.append(Row(check="tokenizer", verdict=FAIL, value=value,
                        advice=f"the data was made with {value}, the run expects "
                        f"{wanted[:12] or 'one'}"))  # fmt: skip
    elif tokenizers:
        rows.append(Row(check="tokenizer", verdict=OK, value=value))
    return rows


def memory(facts: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]) -> Row:
    """The recipe's planned peak against the smallest device."""
    if "needed_gib" not in plan:
        return Row(check="memory", verdict=FAIL if plan.get("error") else SKIPPED,
                   value="not planned", advice=str(plan.get("error", "")))  # fmt: skip
    least = min(facts, key=lambda one: one["device"]["memory_bytes"])
    has, needs = least["device"]["memory_bytes"] / GIB, float(plan["needed_gib"])
    value = f"needs {needs:.2f} of {has:.2f} GiB a rank"
    if needs <= 0.9 * has:
        return Row(check="memory", verdict=OK, value=value)
    return Row(
        check="memory", verdict=FAIL if needs > has else WARN, value=value,
        advice=f"the smallest device is rank {least['rank']}'s on {least['node']}; leyden plan "
        "says what would fit",
    )  # fmt: skip


def checkpoints(facts: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]) -> Row:
    """All checkpoints that are kept, and the one being written, against the space of run_root."""
    free = [one["disks"][0]["free_bytes"] for one in facts
            if one["disks"] and not one["disks"][0]["error"]]  # fmt: skip
    if "checkpoint_bytes" not in plan or not free:
        return Row(check="checkpoints", verdict=SKIPPED, value="not planned")
    copies = int(plan["ranks"]) if plan.get("strategy") != "ddp" else 1
    size = float(plan["checkpoint_bytes"]) * copies / GIB
    kept = int(plan.get("keep", 1)) + 1
    value = f"{kept} x {size:.2f} GiB, {min(free) / GIB:.1f} GiB free"
    if size * kept * GIB <= min(free):
        return Row(check="checkpoints", verdict=OK, value=value)
    return Row(
        check="checkpoints", verdict=FAIL, value=value,
        advice="the checkpoints that are kept do not fit; lower keep, or free space",
    )  # fmt: skip


def judge(
    facts: Sequence[Mapping[str, Any]],
    *,
    run_root: str,
    expected: Mapping[str, str],
    plan: Mapping[str, Any],
) -> list[Row]:
    """All rows, from what every rank has gathered, in the order of ranks."""
    rows = [devices(facts), versions(facts), all_reduce(facts), bandwidth(facts), clocks(facts)]
    rows += [disks(facts, index) for index in range(len(facts[0]["disks"]))]
    rows += [shared_folder(facts, run_root), shared_memory(facts)]
    return [*rows, *dataset(facts, expected), memory(facts, plan), checkpoints(facts, plan)]


def _ranks(facts: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"rank {one['rank']} on {one['node']}" for one in facts)


def _range(rates: Iterable[float]) -> str:
    listed = [rate / 1e6 for rate in rates]
    low, high = min(listed), max(listed)
    return f"{low:.0f}" if round(low) == round(high) else f"{low:.0f}-{high:.0f}"
