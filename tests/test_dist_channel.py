"""The queue between the loader's threads: bounded by weight, ended from either side."""

from __future__ import annotations

import threading
import time

from dist.channel import Channel


def settle(done: list[int], wanted: list[int]) -> None:
    """Wait until a thread has done what is wanted, and see that it does no more."""
    deadline = time.monotonic() + 30
    while done != wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert done == wanted


def test_weights_bound_what_waits_and_a_heavy_item_still_passes() -> None:
    """Counting items would hold 16 steps of any size; refusing what is too heavy would hang."""
    channel, done = Channel(10), []

    def produce() -> None:
        for weight in (6, 4, 1, 25):
            channel.put(weight, weight)
            done.append(weight)

    thread = threading.Thread(target=produce)
    thread.start()
    settle(done, [6, 4])
    found = [channel.get()]
    settle(done, [6, 4, 1])  # 25 waits until nothing else does
    found += [channel.get(), channel.get(), channel.get()]
    thread.join(60)
    assert found == [6, 4, 1, 25] and not thread.is_alive()


def test_close_wakes_whoever_waits() -> None:
    """A thread that waits in a closed queue would hold the process open."""
    full, empty, ended = Channel(1), Channel(1), []
    full.put("one")
    threads = [
        threading.Thread(target=lambda: ended.append(full.put("two"))),
        threading.Thread(target=lambda: ended.append(empty.get())),
        threading.Thread(target=lambda: ended.append(empty.wait_begun(3))),
    ]
    for thread in threads:
        thread.start()
    full.close()
    empty.close()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert sorted(ended, key=str) == [False, False, None] and full.get() is None


def test_many_items_pass_in_order_whoever_waits() -> None:
    """A wake-up that gets lost between two threads: a run that stands still, once in a million
    steps. Room for one, two and many; a third thread follows how far the consumer is."""
    for capacity in (1, 2, 50):
        channel, followed, found = Channel(capacity), [], []

        def produce(channel: Channel = channel) -> None:
            for number in range(3000):
                assert channel.put(number)
            channel.put(None)

        def follow(channel: Channel = channel, followed: list[int] = followed) -> None:
            for step in range(0, 3000, 7):
                if channel.wait_begun(step):
                    followed.append(step)

        def consume(channel: Channel = channel, found: list[int] = found) -> None:
            while (item := channel.get()) is not None:
                channel.begin(item)
                found.append(item)

        # Daemons: should one wait for ever, the test is to fail and not to hang.
        targets = (produce, follow, consume)
        threads = [threading.Thread(target=target, daemon=True) for target in targets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert found == list(range(3000)) and followed == list(range(0, 3000, 7))


def test_a_wait_for_an_item_ends_in_time() -> None:
    """A run that settles before it ends must not wait for a loader that hangs."""
    channel = Channel(1)
    started = time.monotonic()
    channel.wait_filled(0.2)
    assert 0.2 <= time.monotonic() - started < 10
    channel.put("one")
    channel.wait_filled(20)
