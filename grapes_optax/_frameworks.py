"""The frameworks that the adapters are for, none of which is a dependency."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def extra(framework: str) -> Iterator[None]:
    """An import within, where the framework is absent, says what installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != framework:
            raise  # of the framework's own dependencies
        raise ImportError(
            f"{framework} is not installed: pip install 'grapes-optax[{framework}]'",
            name=framework,
        ) from error
