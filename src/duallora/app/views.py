"""The page: three views of one model."""

from __future__ import annotations

from typing import Any

import gradio as gr

from duallora.app.assets import asset
from duallora.app.session import Session
from duallora.app.shell import PRIVATE, Shell
from duallora.app.view_look import Look
from duallora.app.view_teach import Teach
from duallora.app.view_try import Try

# Gradio draws what changes anew; a live region is only read out if it was there before its content. And the
# buttons for files all have the same name.
LIVE = """() => {
  const set = (place, name, value) => {
    if (place.getAttribute(name) !== value) place.setAttribute(name, value);
  };
  const mark = () => {
    document.querySelectorAll(".said").forEach((place) => {
      if (place.parentElement.closest(".said")) return;
      set(place, "role", "status");
      set(place, "aria-live", "polite");
    });
    document.querySelectorAll(".upload").forEach((place) => {
      const label = place.querySelector("[data-testid=block-label]");
      const button = place.querySelector("button[aria-label^=Click]");
      if (label && button) set(button, "aria-label", `${label.innerText.trim()}: choose or drop files`);
    });
  };
  mark();
  new MutationObserver(mark).observe(document.body, { childList: true, subtree: true });
}"""


def build(session: Session) -> gr.Blocks:
    """The page of a model.

    Args:
        session: the model, and what is done with it.
    """
    title = f"{session.folder.resolve().name} - duallora"
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        shell = Shell(session)
        shell.title()
        with gr.Tabs() as tabs:
            with gr.Tab("Teach", id="teach", elem_id="teach-tab"):
                teach = Teach(shell)
            with gr.Tab("Try", id="try", elem_id="try-tab"):
                attempt = Try(shell)
            with gr.Tab("Look", id="look", elem_id="look-tab") as tab:
                look = Look(shell)
        teach.connect(tabs, attempt.picture)
        attempt.connect()
        look.connect()
        page.load(shell.refresh, None, shell.parts, **PRIVATE)
        page.load(teach.on_load, None, teach.learning, concurrency_limit=None, **PRIVATE).then(
            shell.refresh, None, shell.parts, **PRIVATE
        )
        tab.select(shell.refresh, None, shell.parts, **PRIVATE)

        def leave(request: gr.Request) -> None:
            shell.visitors.leave(request.session_hash)

        page.unload(leave)
    return page


def theme() -> Any:
    """Fonts and colours; fonts are the system's, so that nothing is loaded from elsewhere."""
    plain = gr.themes.Default(
        primary_hue="blue",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
        spacing_size="sm",
    )
    # Small grey text has to stand out from its ground by 4.5 to 1.
    grey, dark_grey = "*neutral_600", "*neutral_300"
    return plain.set(
        body_text_color_subdued=grey,
        body_text_color_subdued_dark=dark_grey,
        block_info_text_color=grey,
        block_info_text_color_dark=dark_grey,
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_100",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
        input_placeholder_color=grey,
        input_placeholder_color_dark=dark_grey,
        checkbox_border_color="*neutral_500",
        checkbox_border_color_dark="*neutral_400",
        input_border_color="*neutral_500",
        input_border_color_dark="*neutral_400",
    )


def style() -> str:
    """The style sheet."""
    return asset("style.css")
