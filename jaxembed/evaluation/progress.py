"""One progress bar over all tasks of an evaluation."""

from __future__ import annotations

from jaxembed.devices.processes import progress_bar


class TaskProgress:
    """A bar that counts texts and shows the remaining time. Each task takes its expected share of the bar.

    Attributes:
        task: Name of the current task.
    """

    def __init__(self, expected_texts: dict[str, int | None]):
        """Show the bar.

        Args:
            expected_texts: Expected number of texts by task. None: unknown; it counts as the mean of the others.
        """
        known_counts = [count for count in expected_texts.values() if count]
        mean = max(1, sum(known_counts) // len(known_counts)) if known_counts else 1
        self._shares = {name: count or mean for name, count in expected_texts.items()}
        self.task = ""
        self._end = 0  # position where the current task's share ends
        self._has_encoded = False
        self._total = sum(self._shares.values())
        self._bar = progress_bar(total=self._total, unit="text", unit_scale=True)

    def begin(self, name: str) -> None:
        """Start the share of a task."""
        self.task = name
        self._end += self._shares[name]
        self._has_encoded = False
        self._bar.set_description(name, refresh=True)

    def advance(self, num_texts: int) -> None:
        """Count texts that were encoded, up to the share of the task."""
        self._has_encoded = True
        self._bar.update(min(num_texts, max(0, self._end - self._bar.n)))

    def finish_task(self) -> None:
        """Complete the share of a task. A task that encoded nothing has stored results, and is removed from the bar."""
        remaining_texts = self._end - int(self._bar.n)
        if self._has_encoded:
            self._bar.update(remaining_texts)
        else:  # texts that were not encoded must not count towards the speed
            self._total -= remaining_texts
            self._end -= remaining_texts
            self._bar.total = self._total
            self._bar.refresh()

    def close(self) -> None:
        """Close the bar."""
        self._bar.close()
