"""What is under way and how far: told by loops, shown as a bar, as lines or by a callable of the user's."""

from gisp.progress.listen import reporting
from gisp.progress.track import Progress, Task, doing, hears_notes, note, phase, task, track

__all__ = ["Progress", "Task", "doing", "hears_notes", "note", "phase", "reporting", "task", "track"]
