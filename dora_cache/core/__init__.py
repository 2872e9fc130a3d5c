"""What may be used, what is held, and how it is derived: it knows PyTorch, and nothing of PEFT.

- :mod:`.engine` answers calls. :mod:`.calls` makes a call's key, :mod:`.cells` has all that is
  known of it, and :mod:`.deriver` derives its value, once for all threads.
- :mod:`.facts` reads what a value depends on; :mod:`.shortcuts` does so for a hit in one
  expression; :mod:`.audit` compares contents now and then.
- :mod:`.holdings` offers values to the backend and counts; :mod:`.memory` has the backends and
  caps; :mod:`.buffers` the part of them that compiled code reads.
- :mod:`.decorator` has :func:`dora_cache.cached`, and :mod:`.binding` ties a layer to its cache.
"""
