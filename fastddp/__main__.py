"""``python -m fastddp`` prints :func:`fastddp.info`."""

from fastddp.report import info

if __name__ == "__main__":
    print(info())
