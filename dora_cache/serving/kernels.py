LARGEST_RANK = 256


def available(device, *dtypes):
    return False


def adapt_(*a):
    return False
