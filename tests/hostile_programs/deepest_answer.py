"""Returns a list in a list in a list ..."""


def add(a, b):
    answer = []
    for _ in range(100_000):
        answer = [answer]
    return answer
