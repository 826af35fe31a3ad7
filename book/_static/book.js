// A control is called what it shows: voice control and screen readers read the name, people read the text.
document.addEventListener("DOMContentLoaded", () => {
  const named = document.querySelectorAll(".search-button__button, details > summary[aria-label]");
  for (const control of named) control.removeAttribute("aria-label");
  for (const arrow of document.querySelectorAll("summary > .toctree-toggle")) {  // an arrow shows no name at all
    const entry = arrow.closest("li").querySelector("a").textContent.trim();
    arrow.parentElement.setAttribute("aria-label", `pages of ${entry}`);
  }
  for (const entry of document.querySelectorAll(".citation-list > *")) entry.setAttribute("role", "listitem");
});

// What can be scrolled sideways can be scrolled by the arrow keys, too.
window.addEventListener("load", () => {
  for (const wide of document.querySelectorAll("figure, .cell_output")) if (wide.scrollWidth > wide.clientWidth) wide.tabIndex = 0;
});

// The index holds words of Chinese, as jieba cuts them. A query is written without spaces: cut it into the longest words
// that the index knows. Sphinx's own splitQuery steps back when there is one already.
var splitQuery = (query) => (query.match(/\p{Script=Han}+|[^\P{L}\p{Script=Han}]+[\p{N}_]*|[\p{N}_]+/gu) || []).flatMap(known);

function known(run) {
  if (!/\p{Script=Han}/u.test(run)) return [run];
  const words = [], holds = (word) => word in Search._index.terms || word in Search._index.titleterms;
  for (let start = 0; start < run.length; ) {
    let end = run.length;
    while (end > start + 1 && !holds(run.slice(start, end))) end--;
    if (end > start + 1) words.push(run.slice(start, end));
    start = end;
  }
  return words.length ? words : [run];
}
