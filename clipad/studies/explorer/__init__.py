"""The explorer of notebook 06: ``model.py`` says what there is to see, ``widget.py`` (with numbers.js, widget.js and
widget.css) and ``figures.py`` show it, ``panel.py`` has the controls that need the model.
"""
