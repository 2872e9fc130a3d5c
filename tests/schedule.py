"""Threads that run one at a time, in an order that the test decides.

Tasks run in real threads. Each runs until it pauses, ends, or has to wait for a lock or event of
this module; then the test says which one goes on. A test so controlled can be repeated and shrunk,
and a deadlock shows itself: nobody can go on.
"""

import threading
from types import SimpleNamespace


class Task:
    """One call in a thread of its own."""

    def __init__(self, schedule, function):
        self.schedule = schedule
        self.function = function
        self.go = threading.Semaphore(0)
        self.blocked = None
        self.done = False
        self.result = None
        self.error = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        self.schedule.tasks_by_thread[threading.get_ident()] = self
        self.go.acquire()
        try:
            self.result = self.function()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error
        self.done = True
        self.schedule.back.release()

    @property
    def runnable(self):
        return not self.done and (self.blocked is None or self.blocked())


class Schedule:
    """Starts tasks, and lets them go on one at a time."""

    def __init__(self):
        self.back = threading.Semaphore(0)
        self.tasks = []
        self.tasks_by_thread = {}

    def start(self, function):
        task = Task(self, function)
        self.tasks.append(task)
        return task

    def runnable(self):
        return [task for task in self.tasks if task.runnable]

    def resume(self, task):
        """Let a task go on until it pauses, ends or has to wait."""
        task.blocked = None
        task.go.release()
        assert self.back.acquire(timeout=60)
        if task.done:
            task.thread.join(60)
            self.tasks.remove(task)

    def pause(self, until=None):
        """Called in a task: let the test decide who goes on; elsewhere, nothing."""
        task = self.tasks_by_thread.get(threading.get_ident())
        if task is None or task.thread is not threading.current_thread():
            assert until is None or until(), "only tasks can wait"
            return
        task.blocked = until
        self.back.release()
        task.go.acquire()

    def threading(self):
        """What stands in for the module ``threading``."""
        schedule = self

        class RLock:
            def __init__(self):
                self.owner, self.count = None, 0

            def acquire(self, blocking=True):
                me = threading.get_ident()
                if self.owner not in {None, me}:
                    if not blocking:
                        return False
                    schedule.pause(until=lambda: self.owner is None)
                self.owner = me
                self.count += 1
                return True

            def release(self):
                self.count -= 1
                if not self.count:
                    self.owner = None

            def _is_owned(self):
                return self.owner == threading.get_ident()

            def __enter__(self):
                self.acquire()

            def __exit__(self, *_):
                self.release()

        class Event:
            def __init__(self):
                self.flag = False

            def set(self):
                self.flag = True

            def is_set(self):
                return self.flag

            def wait(self, timeout=None):
                if not self.flag:
                    schedule.pause(until=lambda: self.flag)

        return SimpleNamespace(RLock=RLock, Event=Event, get_ident=threading.get_ident)
