// Brings the page to life: every figure drawn when it comes near the view, all for print, and what is drawn is
// drawn anew when its width or the theme changes.

const NEAR = 300; // pixels from the view
const PRINTED_WIDTH = 680;

const drawings = JSON.parse(document.getElementById("drawings").textContent);
const figures = Array.from(document.querySelectorAll("[data-drawing]"), (figure) => {
  const drawing = drawings[figure.dataset.drawing];
  return { width: 0, ...(drawing.kind === "heat maps" ? heatMapFigure : chartFigure)(figure, drawing) };
});
const figureAt = new Map(figures.map((figure) => [figure.place, figure]));

/** Prepare figures for the widths they have, or for the one given, and draw again those that were drawn. */
function renew(some, given) {
  // Every width is read before the first change, or each change would lay out the page again.
  for (const figure of some) figure.width = Math.floor(figure.place.getBoundingClientRect().width);
  for (const figure of some) {
    figure.prepare(given ?? figure.width);
    if (figure.isDrawn()) figure.show();
  }
}

function draw(some) {
  for (const figure of some) if (!figure.isDrawn()) figure.show();
}

startTheme(() => renew(figures));
document.querySelectorAll(".sheet").forEach(startSheet);

if ("IntersectionObserver" in window) {
  const nearing = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      nearing.unobserve(target);
      draw([figureAt.get(target)]);
    }
  }, { rootMargin: `${NEAR}px 0px` });
  for (const { place } of figures) nearing.observe(place);
} else {
  draw(figures);
}

const watcher = new ResizeObserver((entries) => {
  const changed = entries.filter(({ target, contentRect }) => {
    const width = Math.floor(contentRect.width);
    // A window of no width shows nothing.
    return width !== 0 && width !== figureAt.get(target).width;
  });
  renew(changed.map(({ target }) => figureAt.get(target)));
});
for (const { place } of figures) watcher.observe(place);

// Paper is white and narrower than the screen.
addEventListener("beforeprint", () => {
  const root = document.documentElement;
  root.dataset.screen = root.dataset.theme ?? "";
  root.dataset.theme = "light";
  renew(figures, PRINTED_WIDTH);
  draw(figures);
});
addEventListener("afterprint", () => {
  const root = document.documentElement;
  if (root.dataset.screen) root.dataset.theme = root.dataset.screen;
  else delete root.dataset.theme;
  renew(figures);
});
