import pytest

from compressor.text.layout import escape


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("__init__ and _fc_", r"\_\_init\_\_ and \_fc\_"),
        ("# heading", r"\# heading"),
        ("> quoted", r"\> quoted"),
        ("- listed", r"\- listed"),
        ("1. numbered", r"1\. numbered"),
        ("12) numbered", r"12\) numbered"),
        ("$x$", r"\$x\$"),
        ("http://e.com www.e.com a@e.com @all", r"http\://e.com www\.e.com a\@e.com \@all"),
        ("1.5 points, 2:4, 7.", "1.5 points, 2:4, 7."),
        ("magnitude_pruning: -0.83 points, a > b # c", "magnitude_pruning: -0.83 points, a > b # c"),
        ("-0.83 points", "-0.83 points"),
    ],
)
def test_names_cannot_begin_emphasis_or_a_block(name, written):
    assert escape(name) == written
