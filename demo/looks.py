"""How the page looks: in light and in dark, and on a screen as narrow as a phone's."""

from __future__ import annotations

from typing import Any

__all__ = ["CSS", "theme"]

# Colours are variables of the theme wherever it has one: they follow light and dark, also when a visitor changes it.
# Plotly writes its colours into the picture, so they are overruled here; lines and bars keep their hue, the lightness
# is turned round in dark, where #202020 could not be seen.
_PLOTS = """
.js-plotly-plot .main-svg { background: transparent !important; }
.js-plotly-plot .main-svg > .bg, .js-plotly-plot .legend > .bg { fill: transparent !important; }
.js-plotly-plot :is(.xaxislayer-above, .yaxislayer-above, .infolayer) text { fill: var(--body-text-color) !important; }
.js-plotly-plot .annotation-text-g .bg { fill: var(--background-fill-primary) !important; }
.js-plotly-plot .gridlayer path { stroke: var(--border-color-primary) !important; }
.js-plotly-plot .zerolinelayer path { stroke: var(--body-text-color-subdued) !important; }
/* It would hide what is written there; dragging and a double click do what one needs. */
#overview-plot .modebar { display: none !important; }
.js-plotly-plot .modebar-group { background: transparent !important; }
.js-plotly-plot .modebar-btn .icon path { fill: var(--body-text-color-subdued) !important; }
.dark .js-plotly-plot :is(.scatterlayer, .barlayer, .legendlines, .legendsymbols) {
  filter: invert(1) hue-rotate(180deg); }
"""
_TEXTS = """
.message p { color: #b00020; font-weight: 600; overflow-wrap: anywhere; }
.dark .message p { color: #ff8f9d; }
:is(.message, .said) .html-container { padding: 0 !important; }
.message p, .said p { margin: 0; white-space: pre-line; }
.hint p, .small { color: var(--body-text-color-subdued); font-size: .85rem; margin: 0; }
.headline { font-size: 1.2rem; font-weight: 600; line-height: 1.4; margin: 0; overflow-wrap: anywhere; }
.asked { overflow-wrap: anywhere; margin: 0 0 .4rem; }
"""
_TABLES = """
.wide { overflow-x: auto; }
.answers td, .answers th { padding: 4px 10px !important; text-align: left; }
.answers td:first-child { min-width: 11rem; }
.answers tr.r0 td { font-weight: 600; }
.pair { width: 100%; }
.pair td, .pair th { border-color: var(--border-color-primary) !important; }
.pair td, .pair th { padding: 4px 8px !important; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.pair td:first-child, .pair th:first-child { min-width: 4.6rem; overflow-wrap: normal; }
.pair td:first-child { color: var(--body-text-color-subdued); }
.facts td, .facts th { word-break: normal; overflow-wrap: normal; }
table { font-variant-numeric: tabular-nums; }
"""
# There every row of the answers is its name across the page, and below it unreduced, A and B side by side.
_NARROW = """
@media (max-width: 640px) {
  .gradio-container { padding: 8px !important; }
  /* Gradio puts tabs that find no room into a menu without a name. */
  .tab-container button { padding: 0 5px !important; font-size: .85rem !important; }
  .pair td, .pair th { padding: 3px 4px !important; font-size: .8rem; }
  .facts td, .facts th { padding: 4px 5px !important; font-size: .8rem; }
  .answers, .answers thead, .answers tbody, .answers tr { border: 0 !important; padding: 0 !important; margin: 0; }
  .answers, .answers thead, .answers tbody { display: block; width: 100%; }
  .answers tr { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .answers td, .answers th { padding: 3px 5px !important; font-size: .8rem; overflow-wrap: anywhere; }
  .answers td:first-child { grid-column: 1 / -1; min-width: 0; padding-top: 8px !important; font-weight: 400;
    border-width: 0 !important; color: var(--body-text-color-subdued); }
  .answers th:first-child { display: none; }
  .html-container:has(.answers) { padding: 10px 0 !important; }
}
"""
CSS = f"""
footer {{ display: none !important; }}
.gradio-container {{ max-width: 1320px !important; }}
.gallery-examples .grid-wrap {{ overflow-x: hidden; }}
.gallery-examples .grid-container {{ grid-template-columns: repeat(3, minmax(0, 1fr)) !important; }}
.gallery-four .grid-container {{ grid-template-columns: repeat(4, minmax(0, 1fr)) !important; }}
.gallery-row, .gallery-row .grid-wrap {{ height: auto !important; min-height: 0 !important; overflow: hidden; }}
.gallery-row .grid-container {{ grid-template-columns: repeat(6, minmax(0, 1fr)) !important; }}
{_TEXTS}{_TABLES}{_PLOTS}{_NARROW}"""


def theme() -> Any:
    """Gradio's own, with no fonts from elsewhere and with hints that can be read on either background."""
    import gradio as gr

    made = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return made.set(
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
    )  # fmt: skip
