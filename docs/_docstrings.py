"""How docstrings of the package are read for the site: ``Example:`` is a section with doctests."""

import re

import griffe


class Examples(griffe.Extension):
    """Google's style says ``Examples:``; griffe takes the singular for a paragraph of its own."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        """Change the word, whatever it belongs to."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M
            )
