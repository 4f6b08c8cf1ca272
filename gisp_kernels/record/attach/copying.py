"""What a recorder puts into modules must not travel with a copy of them: a copy would record into the original."""

from __future__ import annotations

from typing import Any, NoReturn


class Uncopyable:
    """Refuses ``copy.deepcopy`` and pickling, of itself and so of every module that holds it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        self._refuse()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise RuntimeError(
            "a module cannot be copied or pickled while it is being recorded: do so outside the recorder, "
            "or save its state_dict()"
        )
