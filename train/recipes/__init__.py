"""One file a system; a package where one file is not enough. The folder is scanned.

Recipes of your own may live elsewhere: ``FRONTIER_RECIPES`` names more folders, as PATH
does. Their modules are imported as if they were here.
"""

import os

__path__ += [
    os.path.abspath(folder)
    for folder in os.environ.get("FRONTIER_RECIPES", "").split(os.pathsep)
    if folder
]
