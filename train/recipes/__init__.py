"""One file a system; a package where one file is not enough. The folder is scanned.

Recipes of your own may live elsewhere: ``FRONTIER_RECIPES`` names more folders, as PATH
does. Their modules are imported as if they were here.
"""

import os
from collections.abc import Mapping

VARIABLE = "FRONTIER_RECIPES"


def elsewhere(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The further folders that are named."""
    named = environ.get(VARIABLE, "").split(os.pathsep)
    return [os.path.abspath(folder) for folder in named if folder]


__path__ += elsewhere()
