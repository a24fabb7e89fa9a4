"""``python -m fastddp`` prints :func:`fastddp.info`."""

from fastddp.info import info

if __name__ == "__main__":
    print(info())
