import jax
import pytest


@pytest.fixture(params=["cpu", "cuda"])
def either_platform(request, monkeypatch: pytest.MonkeyPatch) -> None:
    """`jax.lax.platform_dependent` takes the branch of each platform in turn, wherever it runs."""

    def choose(x, cuda, default):
        return (cuda if request.param == "cuda" else default)(x)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
