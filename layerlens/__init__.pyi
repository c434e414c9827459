"""The public names with their types; ``__init__.py`` imports each when it is first asked for."""

from layerlens.library.adapt import adapt as adapt
from layerlens.library.api import choose as choose
from layerlens.library.api import load as load
from layerlens.library.api import plan as plan
from layerlens.library.api import profile as profile
from layerlens.library.plan import Plan as Plan
from layerlens.library.profile import Profile as Profile
from layerlens.library.views import diff as diff
from layerlens.library.views import estimate as estimate

__version__: str
__all__ = ["Plan", "Profile", "__version__", "adapt", "choose", "diff", "estimate", "load", "plan", "profile"]
