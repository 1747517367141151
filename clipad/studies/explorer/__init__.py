"""The explorer of notebook 06.

``settings.py``: what can be set, and the command that brings it back. ``model.py``: settings -> what there is to see.
``widget.py`` with ``numbers.js``, ``widget.js`` and ``widget.css``: the image widget, alive without a kernel.
``panel.py``: the controls that need the model. ``figures.py``: the same as a still figure.
"""
