"""The explorer of notebook 06.

``model.py``: what can be set, and from settings to what there is to see. Two views: ``widget.py`` with ``numbers.js``,
``widget.js`` and ``widget.css`` is the image widget, alive without a kernel; ``figures.py`` the same as a still figure.
``panel.py``: the controls that need the model, and the command that brings a view back.
"""
