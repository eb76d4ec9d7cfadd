"""Does what it should, with files, threads, numpy and printing: passes."""

import threading

import numpy as np

sums = []


def add(a, b):
    with open("numbers.txt", "w+") as file:
        file.write(f"{a} {b}")
        file.seek(0)
        numbers = np.array(file.read().split(), dtype=int)
        thread = threading.Thread(target=lambda: sums.append(np.sum(numbers)))
        thread.start()
        thread.join()
    print("adding", a, b)
    return int(sums[-1])
