import os
import time


def test_of_rank_1():
    if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
        time.sleep(60)
