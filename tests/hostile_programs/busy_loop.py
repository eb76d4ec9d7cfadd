"""Never answers."""


def add(a, b):
    while True:
        pass
