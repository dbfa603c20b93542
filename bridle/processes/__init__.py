"""Child processes: the only place that starts, confines, talks to and ends them.

`child` is the face for programs that wait, `async_child` the one for asyncio; both speak `messages` over `framing`.
"""
