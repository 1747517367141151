"""Notebooks of a few cells, for tests of what reads and runs them."""

from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

PARAMETERS = """preset: str = "demo"  # model, data and protocol [demo|paper]
count: int = 0  # how many [1..16]
share: float = 0.5  # which part [0..1]
flag: bool = False  # a switch
categories: list[str] = []  # which ones
names: list = []  # of anything
options: dict = {}  # of the method
data_root: str = ""  # path of the data
pretrained: str = ""  # published tag, or path of a checkpoint
device: str = ""  # where to compute"""


def notebook(*cells, parameters=PARAMETERS):
    """A notebook of code cells, after a parameters cell."""
    code = [
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *map(new_code_cell, cells),
    ]
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return new_notebook(cells=[new_markdown_cell("# Title"), *code], metadata=metadata)
