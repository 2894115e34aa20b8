"""Routers around routers: a guard, what tells novel samples, and inside of them the one that learnt something."""

from __future__ import annotations

from dataclasses import replace

from moqe.router.guard import GuardedRouter
from moqe.router.novelty import NoveltyRouter
from moqe.router.router import Router


def innermost(router: Router) -> Router:
    """The router inside of guard and novelty, or the router itself."""
    return innermost(router.router) if isinstance(router, GuardedRouter | NoveltyRouter) else router


def with_innermost(router: Router, inner: Router) -> Router:
    """The same wrappers around another router."""
    if isinstance(router, GuardedRouter | NoveltyRouter):
        return replace(router, router=with_innermost(router.router, inner))
    return inner


def novelty_of(router: Router) -> NoveltyRouter | None:
    """What sends novel samples elsewhere, if anything does."""
    if isinstance(router, GuardedRouter):
        return novelty_of(router.router)
    return router if isinstance(router, NoveltyRouter) else None
