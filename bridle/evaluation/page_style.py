"""How the report page looks: on a screen and on a phone, in daylight and in the dark."""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark; --text: #1c1e21; --quiet: #60666e; --line: #dfe2e6; --back: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6e9; --quiet: #9aa1aa; --line: #34383e; --back: #16181b; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 54rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 0.25rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 1.5rem 0 0.5rem; overflow-wrap: anywhere; }
p { margin: 0.25rem 0 0.75rem; }
.headline { font-size: 1.15rem; line-height: 1.4; margin: 1rem 0; }
.quiet, figcaption { color: var(--quiet); font-size: 0.875rem; }
.note { border-left: 3px solid #d55e00; padding-left: 0.75rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: right; padding: 0.3rem 0 0.3rem 0.75rem; border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; } td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 1.25rem; font-size: 0.9rem; margin: 1rem 0; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
svg { display: block; width: 100%; min-width: 38rem; height: auto; }
figure { margin: 0; } img { display: block; width: 100%; height: auto; image-rendering: pixelated; border-radius: 3px; }
audio { display: block; width: 100%; height: 2.5rem; margin: 0.25rem 0 0.75rem; }
.tiles { display: grid; gap: 0.9rem; grid-template-columns: repeat(var(--columns), 1fr); }
pre { font-size: 0.8rem; overflow-x: auto; } summary { cursor: pointer; }
@media (max-width: 40rem) {
  body { padding: 1.25rem 0.9rem 3rem; }
  .tiles { grid-template-columns: repeat(var(--narrow), 1fr); }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 0.4rem; }
}
""".strip()
